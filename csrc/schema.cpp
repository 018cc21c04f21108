// Defines the operators of the `wanda` namespace from their one list of schemas.
#include <torch/library.h>

TORCH_LIBRARY(wanda, m) {
#define SCHEMA(text) m.def(text);
#include "../wanda_kernels/schemas.def"
#undef SCHEMA
}
