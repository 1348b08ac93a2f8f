// Runs launches of KERNELS on the CPU, for tests/metal_host.rs.
//
// Reads one request from standard input (little-endian; see `Request` in the test), runs it once for every order of threads,
// compares the orders bit for bit, and writes the written buffers to standard output. Anything wrong is one line on standard
// error and a status that is not 0.
//
// Memory: every buffer, and threadgroup memory, ends exactly at (or, every other order, begins exactly at) pages that cannot
// be touched, as many as a 32-bit index of floats can reach. A buffer that a launch only reads cannot be written. Threadgroup
// memory and outputs start as NaN.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include "language.h"

namespace host {

constexpr size_t GUARD_BYTES = size_t(17) << 30;
constexpr unsigned MAX_THREADS = 1024;           // of a threadgroup, on every Apple GPU
constexpr unsigned MAX_THREADGROUP_BYTES = 32768;

struct Region {
    std::string name;
    size_t size = 0;
    char* map = nullptr;
    size_t map_size = 0;
    char* data = nullptr;
    size_t open = 0;  // bytes that can be touched
};

std::vector<Region*> regions;

size_t page_size() {
    static const size_t size = size_t(sysconf(_SC_PAGESIZE));
    return size;
}

// `at_end`: the last byte is followed by the guard; else the first one follows it.
void place(Region& region, bool at_end) {
    size_t pages = std::max<size_t>(1, (region.size + page_size() - 1) / page_size()) * page_size();
    if (!region.map) {
        region.map_size = pages + 2 * GUARD_BYTES;
        void* map = mmap(nullptr, region.map_size, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED) {
            perror("mmap");
            _Exit(4);
        }
        region.map = static_cast<char*>(map);
        regions.push_back(&region);
    }
    char* start = region.map + GUARD_BYTES;
    mprotect(start, pages, PROT_READ | PROT_WRITE);
    // An earlier launch may have had more.
    if (region.open > pages) mprotect(start + pages, region.open - pages, PROT_NONE);
    region.open = pages;
    memset(start, 0xff, pages);
    region.data = at_end ? start + pages - region.size : start;
}

void protect(Region& region, bool writable) {
    size_t pages = std::max<size_t>(1, (region.size + page_size() - 1) / page_size()) * page_size();
    // A zero-sized buffer holds nothing to touch.
    int access = region.size == 0 ? PROT_NONE : writable ? PROT_READ | PROT_WRITE : PROT_READ;
    mprotect(region.map + GUARD_BYTES, pages, access);
}

void on_fault(int, siginfo_t* info, void*) {
    const char* address = static_cast<const char*>(info->si_addr);
    static char text[256];
    snprintf(text, sizeof text, "a memory access outside of every buffer");
    for (const Region* region : regions) {
        if (address < region->map || address >= region->map + region->map_size) continue;
        long offset = long(address - region->data);
        if (offset >= 0 && size_t(offset) < region->size) {
            snprintf(text, sizeof text, "a write to %s, which is bound for reading", region->name.c_str());
        } else {
            snprintf(text, sizeof text, "out of bounds: byte %ld of %s, which has %zu", offset, region->name.c_str(),
                     region->size);
        }
    }
    fail(text, 0);
}

// The arguments of the launch under way.
std::vector<char*> bound;
char* shared_memory = nullptr;

// A kernel takes its buffers in order of their index, then threadgroup memory, then its place; the test reads the text's
// attributes and makes sure.
struct Positions {
    unsigned scalar = 0;
};

template <typename P>
struct Argument;

template <typename T>
struct Argument<T*> {
    static T* get(size_t i, Positions&) {
        char* data = i < bound.size() ? bound[i] : shared_memory;
        return (T*)(uintptr_t)data;
    }
};

template <typename T>
struct Argument<T&> {
    static T& get(size_t i, Positions&) {
        return *(T*)(uintptr_t)bound[i];
    }
};

template <>
struct Argument<metal::uint3> {
    static metal::uint3 get(size_t, Positions&) {
        return metal::uint3(now().group.x, now().group.y, now().group.z);
    }
};

template <>
struct Argument<uint> {
    static uint get(size_t, Positions& positions) {
        const uint places[] = {now().current, now().current % LANE_COUNT, now().current / LANE_COUNT,
                               now().threads / LANE_COUNT};
        return places[positions.scalar++];
    }
};

template <typename... P, size_t... I>
void call(void (*function)(P...), std::index_sequence<I...>) {
    Positions positions;
    // Braces: arguments are made from left to right.
    struct Call {
        Call(void (*function)(P...), P... arguments) {
            function(arguments...);
        }
    } done{function, Argument<P>::get(I, positions)...};
    (void)done;
}

struct Entry {
    void (*body)();
    size_t pointers;
};

std::map<std::string, Entry>& entries() {
    static std::map<std::string, Entry> all;
    return all;
}

template <typename F, F function>
struct Body;

template <typename... P, void (*function)(P...)>
struct Body<void (*)(P...), function> {
    static void run() {
        call(function, std::make_index_sequence<sizeof...(P)>());
    }
    static size_t pointers() {
        const bool is[] = {(std::is_pointer<P>::value || std::is_reference<P>::value)...};
        return size_t(std::count(is, is + sizeof...(P), true));
    }
};

struct Register {
    Register(const char* name, Entry entry) {
        if (!entries().emplace(name, entry).second) {
            fprintf(stderr, "two kernels are called %s\n", name);
            _Exit(4);
        }
    }
};

}  // namespace host

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define INSTANTIATE(name, function, ...)                                                                                 \
    static host::Register JOIN(entry, __COUNTER__)(                                                                      \
        name, {&host::Body<decltype(&function<__VA_ARGS__>), &function<__VA_ARGS__>>::run,                               \
               host::Body<decltype(&function<__VA_ARGS__>), &function<__VA_ARGS__>>::pointers()});

#include KERNELS

#undef kernel
#undef thread
#undef device
#undef threadgroup
#undef constant

namespace host {

uint32_t read_u32() {
    uint32_t value;
    if (fread(&value, 4, 1, stdin) != 1) {
        fprintf(stderr, "the request ends early\n");
        _Exit(4);
    }
    return value;
}

std::string read_bytes() {
    std::string bytes(read_u32(), '\0');
    if (!bytes.empty() && fread(&bytes[0], bytes.size(), 1, stdin) != 1) {
        fprintf(stderr, "the request ends early\n");
        _Exit(4);
    }
    return bytes;
}

struct Buffer : Region {
    bool output = false;  // starts as NaN, else as `content`
    std::string content;
};

struct Binding {
    uint32_t buffer;
    bool writes;
};

struct Launch {
    std::string kernel;
    Group grid;
    unsigned threads;
    unsigned shared;
    std::vector<Binding> bindings;
};

unsigned order_number = 0;
uint64_t random_state = 0;

uint64_t random_next() {
    uint64_t z = (random_state += 0x9E3779B97F4A7C15u);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// Order 0: ascending; 1: descending; others: drawn anew every time.
void arrange(std::vector<unsigned>& turns) {
    if (order_number == 1 && turns.front() < turns.back()) std::reverse(turns.begin(), turns.end());
    if (order_number < 2) return;
    for (size_t i = turns.size(); i > 1; i--) std::swap(turns[i - 1], turns[random_next() % i]);
}

void refuse(const Launch& launch, const std::string& why) {
    fprintf(stderr, "%s: %s\n", launch.kernel.c_str(), why.c_str());
    _Exit(2);
}

void run(const Launch& launch, std::vector<Buffer>& buffers, Region& shared) {
    auto entry = entries().find(launch.kernel);
    if (entry == entries().end()) refuse(launch, "there is no such kernel");
    if (launch.threads == 0 || launch.threads > MAX_THREADS)
        refuse(launch, std::to_string(launch.threads) + " threads in a threadgroup; at most 1024 are allowed");
    if (launch.threads % LANE_COUNT) refuse(launch, "threads must come in whole simdgroups");
    if (launch.shared > MAX_THREADGROUP_BYTES)
        refuse(launch, std::to_string(launch.shared) + " bytes of threadgroup memory; at most 32768 are allowed");
    if (launch.shared % 16) refuse(launch, "threadgroup memory must come in multiples of 16 bytes");
    size_t pointers = launch.bindings.size() + (launch.shared > 0);
    if (entry->second.pointers != pointers) refuse(launch, "the launch does not bind what the kernel takes");

    bound.clear();
    for (Buffer& buffer : buffers) protect(buffer, false);
    for (const Binding& binding : launch.bindings) {
        Buffer& buffer = buffers[binding.buffer];
        if (binding.writes) protect(buffer, true);
        bound.push_back(buffer.data);
    }
    shared.size = launch.shared;
    Threadgroup& t = now();
    t.kernel = launch.kernel.c_str();
    t.threads = launch.threads;
    t.body = entry->second.body;
    std::vector<unsigned> groups(size_t(launch.grid.x) * launch.grid.y * launch.grid.z);
    for (size_t i = 0; i < groups.size(); i++) groups[i] = unsigned(i);
    if (groups.size() > 1) arrange(groups);
    for (unsigned i : groups) {
        t.group = {i % launch.grid.x, i / launch.grid.x % launch.grid.y, i / launch.grid.x / launch.grid.y};
        place(shared, order_number % 2 == 0);
        shared_memory = shared.data;
        run_threadgroup(arrange);
    }
}

}  // namespace host

int main(int count, char** arguments) {
    using namespace host;
    if (count == 2 && std::string(arguments[1]) == "--list") {
        for (const auto& entry : entries()) puts(entry.first.c_str());
        return 0;
    }
    std::vector<char> signal_stack(64 << 10);
    stack_t alternate = {};
    alternate.ss_sp = signal_stack.data();
    alternate.ss_size = signal_stack.size();
    sigaltstack(&alternate, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);

    unsigned orders = read_u32();
    std::vector<Buffer> buffers(read_u32());
    for (Buffer& buffer : buffers) {
        buffer.name = read_bytes();
        buffer.output = read_u32() != 0;
        buffer.size = read_u32();
        if (!buffer.output) {
            buffer.content = read_bytes();
            buffer.size = buffer.content.size();
        }
    }
    std::vector<Launch> launches(read_u32());
    for (Launch& launch : launches) {
        launch.kernel = read_bytes();
        launch.grid = {read_u32(), 0, 0};
        launch.grid.y = read_u32();
        launch.grid.z = read_u32();
        launch.threads = read_u32();
        launch.shared = read_u32();
        launch.bindings.resize(read_u32());
        for (Binding& binding : launch.bindings) {
            binding.buffer = read_u32();
            binding.writes = read_u32() != 0;
        }
    }
    Region shared;
    shared.name = "threadgroup memory";
    shared.size = MAX_THREADGROUP_BYTES;
    std::vector<std::string> results;
    for (order_number = 0; order_number < orders; order_number++) {
        random_state = order_number;
        for (Buffer& buffer : buffers) {
            place(buffer, order_number % 2 == 0);
            if (!buffer.output && buffer.size > 0) memcpy(buffer.data, buffer.content.data(), buffer.size);
        }
        for (const Launch& launch : launches) run(launch, buffers, shared);
        std::vector<std::string> written;
        for (Buffer& buffer : buffers) {
            protect(buffer, false);
            written.push_back(std::string(buffer.data, buffer.size));
        }
        for (size_t i = 0; order_number > 0 && i < buffers.size(); i++) {
            if (written[i] != results[i]) {
                fprintf(stderr, "%s differs between orders of the threads: a barrier is missing, or memory is read before it "
                        "is written\n", buffers[i].name.c_str());
                _Exit(2);
            }
        }
        results = written;
    }
    for (const std::string& result : results) fwrite(result.data(), 1, result.size(), stdout);
    return 0;
}
