// The scheduler of emulator.h: fibers by ucontext, one block after the other.
#include "emulator.h"

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStack = size_t{256} << 10;

enum class State { ready, at_barrier, in_meeting, done };

struct Context {
  ucontext_t begin;
  jmp_buf jump;
  bool begun = false;
};

struct Fiber {
  Context context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  State state;
  Place place;
  uint32_t mask;
  const void* payload;
  size_t bytes;
  std::shared_ptr<const Meeting> meeting;
};

std::vector<std::unique_ptr<Fiber>> fibers;
size_t count, current;
Context scheduler;
[[maybe_unused]] const void* scheduler_stack;
[[maybe_unused]] size_t scheduler_bytes;
const std::function<void()>* body;
std::string message;
unsigned order = 2;
int processors = 132, launches = 0;
std::mt19937 random_order;

std::string at(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

void complain(Place place, const std::string& what) {
  if (!message.empty()) return;
  message = at(place) + ": thread " + std::to_string(current) + " of block " + std::to_string(blockIdx.x) + "," +
            std::to_string(blockIdx.y) + " " + what;
}

// A jump spares the two system calls of swapcontext, which the address sanitizer wants to see.
void change(Context* from, Context* to) {
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&from->begin, &to->begin);
#else
  if (_setjmp(from->jump)) return;
  from->begun = true;
  if (to->begun) _longjmp(to->jump, 1);
  setcontext(&to->begin);
#endif
}

// From the running fiber to the scheduler, until it is this fiber's turn again.
void suspend() {
  Fiber& fiber = *fibers[current];
  [[maybe_unused]] void* saved = nullptr;
  __sanitizer_start_switch_fiber(fiber.state == State::done ? nullptr : &saved, scheduler_stack, scheduler_bytes);
  change(&fiber.context, &scheduler);
  __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
}

void run_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
  (*body)();
  fibers[current]->state = State::done;
  suspend();
}

void resume(size_t thread) {
  current = thread;
  threadIdx = {static_cast<unsigned>(thread % blockDim.x), static_cast<unsigned>(thread / blockDim.x % blockDim.y),
               static_cast<unsigned>(thread / blockDim.x / blockDim.y)};
  [[maybe_unused]] void* saved = nullptr;
  __sanitizer_start_switch_fiber(&saved, fibers[thread]->stack.get(), kStack);
  change(&scheduler, &fibers[thread]->context);
  __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
}

bool same(Place a, Place b) { return a.line == b.line && !strcmp(a.file, b.file); }

// Fills the calling library's shared variables, which are its thread-local ones, with NaN.
void poison_shared_memory() {
  [[maybe_unused]] static thread_local volatile char there;
  there = 0;  // the first use of one of a library's thread-local variables brings them all to life
  const auto visit = [](dl_phdr_info* info, size_t, void*) {
    Dl_info own;
    dladdr(reinterpret_cast<void*>(&poison_shared_memory), &own);
    if (info->dlpi_addr != reinterpret_cast<ElfW(Addr)>(own.dli_fbase)) return 0;
    for (int i = 0; i < info->dlpi_phnum && info->dlpi_tls_data; ++i) {
      if (info->dlpi_phdr[i].p_type == PT_TLS) memset(info->dlpi_tls_data, 0xff, info->dlpi_phdr[i].p_memsz);
    }
    return 1;
  };
  dl_iterate_phdr(visit, nullptr);
}

// When the fiber is the last one that a meeting or the barrier waited for, all that waited go on.
void release_meeting(size_t thread) {
  const Fiber& last = *fibers[thread];
  const size_t warp = thread / 32 * 32;
  const auto waits = [&](size_t lane) {
    if (warp + lane >= count) return false;
    const Fiber& f = *fibers[warp + lane];
    return f.state == State::in_meeting && f.mask == last.mask && same(f.place, last.place);
  };
  for (size_t i = 0; i < 32; ++i) {
    if (last.mask >> i & 1u && !waits(i)) return;
  }
  const auto meeting = std::make_shared<Meeting>();
  meeting->lanes = last.mask;
  meeting->place = last.place;
  for (size_t i = 0; i < 32; ++i) {
    if (!(meeting->lanes >> i & 1u)) continue;
    Fiber& f = *fibers[warp + i];
    if (f.bytes) memcpy(meeting->payload[i], f.payload, f.bytes);
    f.meeting = meeting;
    f.state = State::ready;
  }
}

void release_barrier() {
  const Place place = fibers[0]->place;
  for (size_t i = 0; i < count; ++i) {
    if (fibers[i]->state != State::at_barrier) return;
    if (!same(fibers[i]->place, place)) complain(place, "waits here, but another waits at " + at(fibers[i]->place));
  }
  for (size_t i = 0; i < count; ++i) fibers[i]->state = State::ready;
}

void explain_deadlock() {
  for (size_t i = 0; i < count; ++i) {
    if (fibers[i]->state == State::done) continue;
    current = i;
    complain(fibers[i]->place, "waits for threads that do not come");
  }
}

// Lets a thread run to where it next waits; whether it could.
bool step(size_t thread) {
  if (fibers[thread]->state != State::ready || !message.empty()) return false;
  resume(thread);
  if (fibers[thread]->state == State::in_meeting) release_meeting(thread);
  if (fibers[thread]->state == State::at_barrier) release_barrier();
  return true;
}

void run_block() {
  static std::vector<size_t> turns;
  turns.resize(count);
  for (size_t i = 0; i < count; ++i) {
    turns[i] = order == 1 ? count - 1 - i : i;
    Fiber& fiber = *fibers[i];
    fiber.state = State::ready;
    fiber.context.begun = false;
    ucontext_t& begin = fiber.context.begin;
    getcontext(&begin);
    begin.uc_stack.ss_sp = fiber.stack.get();
    begin.uc_stack.ss_size = kStack;
    begin.uc_link = nullptr;
    makecontext(&begin, run_fiber, 0);
  }
  for (bool some = true; some && message.empty();) {
    some = false;
    if (order > 1) std::shuffle(turns.begin(), turns.end(), random_order);
    for (size_t thread : turns) {
      some |= step(thread);
      for (bool more = order % 2 == 0; more;) {
        more = false;
        for (size_t i = thread / 32 * 32; i < std::min(thread / 32 * 32 + 32, count); ++i) more |= step(i);
      }
    }
  }
  if (message.empty()) explain_deadlock();
}

}  // namespace

void sync_block(Place place) {
  Fiber& fiber = *fibers[current];
  fiber.state = State::at_barrier;
  fiber.place = place;
  suspend();
}

const Meeting& meet(Place place, uint32_t mask, const void* payload, size_t bytes) {
  Fiber& fiber = *fibers[current];
  if (bytes > kPayload || !(mask >> current % 32 & 1u)) complain(place, "is not in its own mask");
  fiber.state = State::in_meeting;
  fiber.place = place;
  fiber.mask = mask;
  fiber.payload = payload;
  fiber.bytes = bytes;
  suspend();
  return *fibers[current]->meeting;
}

void fail(Place place, const char* what) { complain(place, what); }

const char* launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  gridDim = grid;
  blockDim = block;
  count = size_t{block.x} * block.y * block.z;
  body = &kernel;
  message.clear();
  ++launches;
  if (count < 1 || count > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) {
    return "invalid configuration argument";
  }
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  for (uint64_t i = 0; i < uint64_t{grid.x} * grid.y * grid.z && message.empty(); ++i) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    poison_shared_memory();
    run_block();
  }
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace emulator

int lockin_fast::multiprocessors() { return emulator::processors; }

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The order in which threads take their turns: 0 as numbered, 1 backwards, any other a seed. With an even one a warp
// runs as far as it gets before another does, with an odd one all advance together. And the size of the GPU.
EXPORTED void emulate(unsigned seed, int multiprocessors) {
  emulator::order = seed;
  emulator::random_order.seed(seed);
  emulator::processors = multiprocessors;
}

EXPORTED int launches() { return emulator::launches; }
