// The machine behind simt.h: fibers, barriers, warp-wide operations, the memory checks. Not instrumented.
#include "simt.h"

#include <signal.h>

#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "fibers.h"

namespace simt {

Index3 thread_index, block_index;
Dim3 block_dim, grid_dim;

namespace {

constexpr int kNobody = -1, kSeveral = -2;  // in place of a thread; below: several of a warp
constexpr int several_of(int warp) { return -3 - warp; }
constexpr int warp_of(int thread) { return thread >= 0 ? thread / 32 : -3 - thread; }  // kSeveral: of none

enum State { kReady, kAtBarrier, kAtWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t size;
  int group;
};

struct Thread {
  State state;
  int site;       // where it waits
  uint32_t mask;  // of the warp-wide operation it waits in
  uint64_t value;
  uint32_t block_epoch, warp_epoch;  // barriers passed
  int groups;                        // of asynchronous copies, committed
  std::vector<Copy> copies;
};

struct Site {
  std::string file;
  int line;
  SiteKind kind;
  uint64_t visits;
};

struct Access {
  int thread = kNobody;
  uint32_t block = 0, block_epoch = 0, warp_epoch = 0;
  bool atomic = false;
};
struct Byte {
  Access write, read;
};

struct Region {
  uintptr_t begin, end;
  std::string name;
  bool writable, shared;
  std::vector<Byte> bytes;
};

struct Machine {
  // Options.
  Order order = kForward;
  bool races = true;
  int disabled = -1;
  int removed_lane = 31;
  std::mt19937_64 random;

  std::vector<Site> sites;
  std::map<std::tuple<std::string, int, int>, int> site_numbers;
  std::vector<Region> regions;  // shared memory first
  std::vector<std::string> errors;

  std::vector<Thread> threads = std::vector<Thread>(kMostThreads);
  int count = 0, current = -1;
  uint32_t block = 0;
  bool stopping = false;
  const std::function<void()>* kernel = nullptr;
  std::vector<unsigned char> shared;
} m;

std::string where(int site) {
  return site < 0 ? "?" : m.sites[site].file + ":" + std::to_string(m.sites[site].line);
}

void report(const std::string& text) {
  if (m.errors.size() < 16) m.errors.push_back("block " + std::to_string(m.block) + ": " + text);
}

void fiber_main() {
  (*m.kernel)();
  m.threads[m.current].state = kDone;
  leave_fiber(m.current);
}

void resume(int thread) {
  m.current = thread;
  thread_index.x = thread;
  enter_fiber(thread);
  m.current = -1;
}

}  // namespace

void fail(const std::string& text) {
  report(text);
  m.stopping = true;
  leave_fiber(m.current);
}

namespace {

// A wild address, far from any buffer.
void on_fault(int) {
  if (m.current < 0) abort();
  fail("out of bounds: access to an unmapped address, thread " + std::to_string(m.current));
}

void wait(State state, int site) {
  Thread& self = m.threads[m.current];
  self.state = state;
  self.site = site;
  leave_fiber(m.current);
}

void release_barrier_if_full() {
  int site = -1;
  for (int i = 0; i < m.count; ++i) {
    if (m.threads[i].state != kAtBarrier) return;
    if (site >= 0 && m.threads[i].site != site) {
      report("divergent barriers at " + where(site) + " and " + where(m.threads[i].site));
      m.stopping = true;
      return;
    }
    site = m.threads[i].site;
  }
  for (int i = 0; i < m.count; ++i) {
    m.threads[i].state = kReady;
    ++m.threads[i].block_epoch;
  }
}

bool run_ready(int first, int last) {  // [first, last) in the order asked for; true if any ran
  std::vector<int> order(last - first);
  for (int i = first; i < last; ++i) order[i - first] = m.order == kReverse ? last - 1 - (i - first) : i;
  if (m.order == kRandom) std::shuffle(order.begin(), order.end(), m.random);
  bool ran = false;
  for (int thread : order) {
    if (m.threads[thread].state != kReady || m.stopping) continue;
    resume(thread);
    ran = true;
  }
  return ran;
}

void run_block() {
  for (int i = 0; i < m.count; ++i) {
    m.threads[i] = Thread{};
    m.threads[i].state = kReady;
    make_fiber(i);
  }
  while (!m.stopping) {
    bool ran = false;
    if (m.order == kWarpAhead) {
      for (int first = 0; first < m.count; first += 32) {
        while (run_ready(first, std::min(first + 32, m.count))) ran = true;
      }
    } else {
      ran = run_ready(0, m.count);
    }
    if (m.stopping) return;
    release_barrier_if_full();
    if (ran) continue;
    bool all_done = true, any_ready = false;
    std::string waiting;
    for (int i = 0; i < m.count; ++i) {
      any_ready |= m.threads[i].state == kReady;
      if (m.threads[i].state == kDone) continue;
      all_done = false;
      const std::string site = where(m.threads[i].site);
      if (waiting.find(site) == std::string::npos) waiting += " " + site;
    }
    if (all_done) return;
    if (!any_ready) {
      report("threads wait for ever at" + waiting);
      m.stopping = true;
    }
  }
}

// Memory checks. An access is ordered after another of the same block if a barrier, or a barrier of their
// warp, lies between them. Blocks are never ordered.
bool is_ordered(const Access& before, const Access& now) {
  if (before.thread == kNobody) return true;
  if (before.block != now.block) return false;
  if (before.block_epoch < now.block_epoch) return true;
  if (before.thread == now.thread) return true;
  return warp_of(before.thread) == warp_of(now.thread) && before.warp_epoch < now.warp_epoch;
}

}  // namespace

void check_access(uintptr_t address, size_t size, bool is_write, bool is_atomic) {
  if (m.current < 0 || !m.races) return;
  for (Region& region : m.regions) {
    // A margin of 64 bytes on both sides belongs to the test: nobody may touch it.
    if (address + size + 64 <= region.begin || address >= region.end + 64) continue;
    const auto complain = [&](const std::string& what) {
      fail(what + " of " + std::to_string(size) + " bytes at " + region.name + "[" +
           std::to_string(static_cast<int64_t>(address - region.begin)) + "], thread " +
           std::to_string(m.current));
    };
    if (address < region.begin || address + size > region.end) return complain("out of bounds: access");
    if (address % size != 0) return complain("misaligned access");
    if (is_write && !region.writable) return complain("write to read-only memory");
    const Thread& self = m.threads[m.current];
    const Access now{m.current, m.block, self.block_epoch, self.warp_epoch, is_atomic};
    for (size_t i = address - region.begin; i < address - region.begin + size; ++i) {
      Byte& byte = region.bytes[i];
      if (!(is_atomic && byte.write.atomic) && !is_ordered(byte.write, now))
        return complain("race: access after write");
      if (is_write && !(is_atomic && byte.read.atomic) && !is_ordered(byte.read, now)) {
        return complain("race: write after read");
      }
      if (region.shared && !is_write && byte.write.thread == kNobody)
        return complain("read of unwritten memory");
      if (is_write) {
        byte.write = now;
        byte.read = is_atomic ? now : Access{};
      } else if (byte.read.thread != kNobody && byte.read.thread != now.thread &&
                 byte.read.block == now.block && byte.read.block_epoch == now.block_epoch) {
        const int warp = warp_of(now.thread);
        const uint32_t warp_epoch = std::max(byte.read.warp_epoch, now.warp_epoch);
        const bool same_warp = warp_of(byte.read.thread) == warp;
        byte.read = now;
        byte.read.thread = same_warp ? several_of(warp) : kSeveral;
        byte.read.warp_epoch = warp_epoch;
      } else if (byte.read.thread == kNobody || byte.read.block == now.block) {
        byte.read = now;
      } else {
        byte.read = now;  // read by several blocks: a write by any of them, or another, is a race
        byte.read.block = UINT32_MAX;
      }
    }
    return;
  }
}

int register_site(const char* file, int line, int counter, SiteKind kind) {
  const std::string path = file, name = path.substr(path.rfind('/') + 1);
  const auto key = std::make_tuple(name, line, counter);
  const auto found = m.site_numbers.find(key);
  if (found != m.site_numbers.end()) return found->second;
  m.sites.push_back({name, line, kind, 0});
  return m.site_numbers[key] = static_cast<int>(m.sites.size()) - 1;
}

void launch(Dim3 grid, uint32_t threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (!make_stacks()) return report("no memory for the fibers' stacks");
  if (threads == 0 || threads > kMostThreads)
    return report("a block of " + std::to_string(threads) + " threads");
  m.kernel = &kernel;
  m.count = static_cast<int>(threads);
  m.stopping = false;
  for (Region& region : m.regions)
    region.bytes.assign(region.end - region.begin, Byte{});  // launches are in order
  m.shared.resize(shared_bytes + 256);
  const uintptr_t base = (reinterpret_cast<uintptr_t>(m.shared.data()) + 64 + 15) / 16 * 16;
  m.regions.insert(m.regions.begin(), Region{base, base + shared_bytes, "shared", true, true, {}});
  struct sigaction action = {}, old_segv, old_bus;
  action.sa_handler = &on_fault;
  action.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  grid_dim = grid;
  block_dim = {threads, 1, 1};
  m.block = 0;
  for (uint32_t z = 0; z < grid.z; ++z) {
    for (uint32_t y = 0; y < grid.y; ++y) {
      for (uint32_t x = 0; x < grid.x && !m.stopping; ++x, ++m.block) {
        block_index = {x, y, z};
        std::fill(m.shared.begin(), m.shared.end(), 0xa5);
        m.regions[0].bytes.assign(shared_bytes, Byte{});
        run_block();
      }
    }
  }
  m.regions.erase(m.regions.begin());
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
}

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(m.regions[0].begin); }
uint32_t lane() { return thread_index.x % 32; }

void block_barrier(int site) {
  ++m.sites[site].visits;
  if (site != m.disabled) wait(kAtBarrier, site);
}

uint32_t mask_at(int site, uint32_t mask) {
  ++m.sites[site].visits;
  return site == m.disabled ? mask & ~(1u << m.removed_lane) : mask;
}

void exchange(int site, uint32_t mask, uint64_t value, uint64_t (&lanes)[32]) {
  const int self = m.current, first = self / 32 * 32;
  if (!(mask >> (self - first) & 1)) return fail("the mask at " + where(site) + " lacks the calling lane");
  m.threads[self].value = value;
  m.threads[self].mask = mask;
  m.threads[self].state = kAtWarp;
  m.threads[self].site = site;
  bool complete = true;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= m.count) return fail("the mask at " + where(site) + " names lanes that the block lacks");
    const Thread& other = m.threads[first + i];
    complete &= other.state == kAtWarp;
    if (other.state == kAtWarp && (other.site != site || other.mask != mask)) {
      return fail("warp-wide operations meet at " + where(site) + " and " + where(other.site));
    }
  }
  // Each lane keeps its own copy: a lane may be in its next operation before another leaves this one.
  static uint64_t results[kMostThreads][32];
  if (complete) {
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      for (int j = 0; j < 32; ++j) results[first + i][j] = mask >> j & 1 ? m.threads[first + j].value : 0xbad;
      m.threads[first + i].state = kReady;
    }
  } else {
    leave_fiber(self);
  }
  std::copy(results[self], results[self] + 32, lanes);
}

void warp_barrier(int site) {
  ++m.sites[site].visits;
  if (site == m.disabled) return;
  uint64_t lanes[32];
  exchange(site, 0xffffffffu, 0, lanes);
  ++m.threads[m.current].warp_epoch;
}

void load_matrices(const void* row, uint32_t (&part)[4]) {
  uint64_t rows[32];
  exchange(-1, 0xffffffffu, reinterpret_cast<uint64_t>(row), rows);
  for (int i = 0; i < 4; ++i) {
    if (rows[8 * i + lane() / 4] % 16 != 0) fail("ldmatrix: a row is not 16-byte aligned");
    const uint64_t from = rows[8 * i + lane() / 4] + 4 * (lane() % 4);
    check_access(from, 4, false, false);
    std::memcpy(&part[i], reinterpret_cast<const void*>(from), 4);
  }
}

uint32_t atomic_add(uint32_t* address, uint32_t value) {
  check_access(reinterpret_cast<uintptr_t>(address), 4, true, true);
  const uint32_t old = *address;
  *address = old + value;
  return old;
}

void copy_now(const Copy& copy) {
  check_access(reinterpret_cast<uintptr_t>(copy.to), copy.size, true, false);
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, copy.size);
    return;
  }
  check_access(reinterpret_cast<uintptr_t>(copy.from), copy.size, false, false);
  std::memcpy(copy.to, copy.from, copy.size);
}
// Copies land as late as they may, or, in random order, at once.
void copy_async(void* to, const void* from, size_t size) {
  const Copy copy{to, from, size, m.threads[m.current].groups};
  if (m.order == kRandom) {
    copy_now(copy);
  } else {
    m.threads[m.current].copies.push_back(copy);
  }
}
void copy_commit() { ++m.threads[m.current].groups; }
void copy_wait(int site, int pending) {
  ++m.sites[site].visits;
  if (site == m.disabled) return;
  Thread& self = m.threads[m.current];
  std::vector<Copy> later;
  for (const Copy& copy : self.copies) {
    if (copy.group < self.groups - pending) {
      copy_now(copy);
    } else {
      later.push_back(copy);
    }
  }
  self.copies = later;
}

}  // namespace simt

using simt::m;

// What the tests call, through ctypes.
extern "C" {

void simt_reset(int order, uint64_t seed, int races, int disabled_site, int removed_lane) {
  m.order = static_cast<simt::Order>(order);
  m.random.seed(seed);
  m.races = races != 0;
  m.disabled = disabled_site;
  m.removed_lane = removed_lane;
  m.regions.clear();
  m.errors.clear();
}
void simt_region(void* begin, size_t size, const char* name, int writable) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  m.regions.push_back({address, address + size, name, writable != 0, false, {}});
}
const char* simt_errors() {
  static std::string text;
  text.clear();
  for (const std::string& error : m.errors) text += error + "\n";
  return text.c_str();
}
// "file:line kind visits" a line, the line's number being the site's.
const char* simt_sites() {
  static std::string text;
  text.clear();
  for (const simt::Site& site : m.sites) {
    text += site.file + " " + std::to_string(site.line) + " " + std::to_string(site.kind) + " " +
            std::to_string(site.visits) + "\n";
  }
  return text.c_str();
}

}  // extern "C"
