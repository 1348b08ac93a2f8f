// One threadgroup on one CPU thread: every thread of it is a fiber that runs until a barrier or a simdgroup operation.
//
// Apple's rules are checked here: all threads of a threadgroup reach the same barrier, all lanes of a simdgroup the same
// simdgroup operations. Fibers run in an order that the caller chooses, so a missing barrier changes the result.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>
#include <ucontext.h>

namespace host {

constexpr unsigned LANE_COUNT = 32;
constexpr size_t STACK_BYTES = 128 << 10;

struct Group {
    unsigned x, y, z;
};

// What a fiber waits for.
enum class Wait { Nothing, Simdgroup, Threadgroup, End };

struct Fiber {
    jmp_buf here;
    std::vector<char> stack;
    Wait wait = Wait::Nothing;
    int line = 0;        // of the operation it waits at
    uint64_t trace = 0;  // hash of the simdgroup operations so far
    float offered = 0;   // to the other lanes
    const float* matrix = nullptr;  // likewise
    bool started = false;
};

struct Threadgroup {
    const char* kernel = "";
    Group group = {0, 0, 0};
    unsigned threads = 0;
    unsigned current = 0;
    void (*body)() = nullptr;
    std::vector<Fiber> fibers;
    jmp_buf scheduler;
};

inline Threadgroup& now() {
    static Threadgroup threadgroup;
    return threadgroup;
}

[[noreturn]] inline void fail(const char* what, int line) {
    Threadgroup& t = now();
    fprintf(stderr, "%s: %s (line %d, thread %u of threadgroup %u %u %u)\n", t.kernel, what, line, t.current, t.group.x,
            t.group.y, t.group.z);
    fflush(stderr);
    _Exit(2);
}

inline Fiber& self() {
    return now().fibers[now().current];
}

// Gives the CPU back to the scheduler until what the fiber waits for has happened.
__attribute__((noinline)) inline void wait_for(Wait wait, int line) {
    Fiber& fiber = self();
    fiber.wait = wait;
    fiber.line = line;
    if (!_setjmp(fiber.here)) {
        _longjmp(now().scheduler, 1);
    }
}

inline void fiber_main() {
    now().body();
    wait_for(Wait::End, 0);
}

// Runs the current fiber until it waits.
__attribute__((noinline)) inline void resume() {
    Threadgroup& t = now();
    if (_setjmp(t.scheduler)) {
        return;
    }
    Fiber& fiber = self();
    fiber.wait = Wait::Nothing;
    if (fiber.started) {
        _longjmp(fiber.here, 1);
    }
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = fiber.stack.size();
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
}

// Lets the lanes of one simdgroup go on where all of them wait at one operation. True if they may.
inline bool release_simdgroup(unsigned first) {
    Threadgroup& t = now();
    const Fiber& leader = t.fibers[first];
    for (unsigned i = first; i < first + LANE_COUNT; i++) {
        const Fiber& fiber = t.fibers[i];
        t.current = i;
        if (fiber.wait != leader.wait) {
            // Lanes that only wait for the whole threadgroup, or are done, will never come.
            fail("a simdgroup operation that not all lanes reach", fiber.wait == Wait::Simdgroup ? fiber.line : leader.line);
        }
        if (fiber.trace != leader.trace || (fiber.wait == Wait::Simdgroup && fiber.line != leader.line)) {
            fail("lanes of a simdgroup take different simdgroup operations", fiber.line);
        }
    }
    return leader.wait == Wait::Simdgroup;
}

// Runs one threadgroup. A simdgroup runs as far as it can before another does, so that one is always ahead of the others;
// `order` arranges the simdgroups, and the lanes anew for every stretch between simdgroup operations.
inline void run_threadgroup(void (*order)(std::vector<unsigned>&)) {
    Threadgroup& t = now();
    std::vector<unsigned> simdgroups(t.threads / LANE_COUNT), lanes(LANE_COUNT);
    std::iota(simdgroups.begin(), simdgroups.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    while (t.fibers.size() < t.threads) {
        t.fibers.emplace_back();
        t.fibers.back().stack.resize(STACK_BYTES);
    }
    for (unsigned i = 0; i < t.threads; i++) {
        t.fibers[i].started = false;
        t.fibers[i].trace = 0;
    }
    for (;;) {
        order(simdgroups);
        for (unsigned simdgroup : simdgroups) {
            do {
                order(lanes);
                for (unsigned lane : lanes) {
                    t.current = simdgroup * LANE_COUNT + lane;
                    resume();
                }
            } while (release_simdgroup(simdgroup * LANE_COUNT));
        }
        // No simdgroup can go on by itself: all threads must be at one barrier, or all done.
        const Fiber& leader = t.fibers[0];
        for (unsigned i = 0; i < t.threads; i++) {
            t.current = i;
            const Fiber& fiber = t.fibers[i];
            if (fiber.wait != leader.wait || fiber.line != leader.line) {
                int line = leader.wait == Wait::End ? fiber.line : leader.line;
                fail("a barrier that not all threads of the threadgroup reach", line);
            }
        }
        if (leader.wait == Wait::End) {
            return;
        }
    }
}

}  // namespace host
