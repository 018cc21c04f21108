"""``python -m wanda_kernels`` is ``wanda-kernels``."""

from .cli.app import main

main()
