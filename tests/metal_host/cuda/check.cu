// Runs the cases that tests/metal_host.rs saved (METAL_HOST_CASES) on an NVIDIA GPU and compares with what the CPU gave:
// `check CASE...`. Prints a line a kernel and a summary; the status is 1 if anything is wrong.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

struct Bindings {
    char* buffers[16];
    unsigned count;
    unsigned threadgroup_floats;
};

static std::map<std::string, void (*)(Bindings)>& entries() {
    static std::map<std::string, void (*)(Bindings)> all;
    return all;
}

struct Register {
    Register(const char* name, void (*entry)(Bindings)) { entries()[name] = entry; }
};

#include "language.h"

template <typename P>
struct Argument;

template <typename T>
struct Argument<T*> {
    static __device__ T* get(const Bindings& bound, size_t i, size_t) {
        extern __shared__ float memory[];
        return i < bound.count ? (T*)bound.buffers[i] : (T*)memory;
    }
};

template <typename T>
struct Argument<T&> {
    static __device__ T& get(const Bindings& bound, size_t i, size_t) { return *(T*)bound.buffers[i]; }
};

template <>
struct Argument<uint3> {
    static __device__ uint3 get(const Bindings&, size_t, size_t) { return uint3(blockIdx.x, blockIdx.y, blockIdx.z); }
};

template <>
struct Argument<uint> {
    static __device__ uint get(const Bindings&, size_t i, size_t count) {
        // The last four: thread, lane, simdgroup, simdgroups.
        size_t place = i + 4 - count;
        return place == 0 ? threadIdx.x : place == 1 ? threadIdx.x % 32 : place == 2 ? threadIdx.x / 32 : blockDim.x / 32;
    }
};

template <typename... P, size_t... I>
__device__ void call(void (*function)(P...), const Bindings& bound, std::index_sequence<I...>) {
    extern __shared__ float memory[];
    for (uint i = threadIdx.x; i < bound.threadgroup_floats; i += blockDim.x) memory[i] = __int_as_float(-1);
    __syncthreads();
    function(Argument<P>::get(bound, I, sizeof...(P))...);
}

template <typename... P>
__device__ void call(void (*function)(P...), const Bindings& bound) {
    call(function, bound, std::make_index_sequence<sizeof...(P)>());
}

#define INSTANTIATE__(number, name, function, ...)                                                   \
    __global__ void entry##number(Bindings bound) { call(function<__VA_ARGS__>, bound); }            \
    static Register register##number(name, entry##number);
#define INSTANTIATE_(number, ...) INSTANTIATE__(number, __VA_ARGS__)
#define INSTANTIATE(...) INSTANTIATE_(__COUNTER__, __VA_ARGS__)

// Each text is a library of its own, as on Apple's side.
namespace lora {
#include LORA
}
#ifndef LORA_ALONE
namespace decoder {
#include DECODER
}
namespace training {
#include TRAINING
}
namespace attention {
#include ATTENTION
}
namespace dequantize {
#include DEQUANTIZE
}
#endif

#undef kernel

static void must(cudaError_t status, const std::string& what) {
    if (status != cudaSuccess) {
        printf("FAILED %s: %s\n", what.c_str(), cudaGetErrorString(status));
        exit(1);
    }
}

struct File {
    FILE* file;
    uint32_t number() {
        uint32_t value = 0;
        if (fread(&value, 4, 1, file) != 1) exit((printf("FAILED: a case ends early\n"), 1));
        return value;
    }
    std::string text() {
        std::string bytes(number(), '\0');
        if (!bytes.empty() && fread(&bytes[0], bytes.size(), 1, file) != 1)
            exit((printf("FAILED: a case ends early\n"), 1));
        return bytes;
    }
};

// Element types of buffers, as the test writes them.
enum Type { NOT_COMPARED, F32, F16, BF16 };

static std::vector<double> values(const std::string& bytes, uint32_t type) {
    std::vector<double> all;
    size_t size = type == F32 ? 4 : 2;
    for (size_t at = 0; at < bytes.size(); at += size) {
        if (type == F32) {
            float value;
            memcpy(&value, &bytes[at], 4);
            all.push_back(value);
        } else {
            uint16_t bits;
            memcpy(&bits, &bytes[at], 2);
            all.push_back(type == F16 ? __half2float(__half(__half_raw{bits}))
                                      : __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits})));
        }
    }
    return all;
}

struct Tally {
    unsigned launches = 0;
    double error = 0;  // the largest of any case that launched it, as a share of what is allowed
};

int main(int count, char** names) {
    std::map<std::string, Tally> kernels;
    unsigned wrong = 0;
    for (int i = 1; i < count; i++) {
        File file = {fopen(names[i], "rb")};
        if (!file.file) exit((printf("FAILED: no file %s\n", names[i]), 1));
        std::string what = file.text();
        file.number();  // orders
        std::vector<char*> buffers(file.number());
        std::vector<size_t> sizes;
        for (char*& buffer : buffers) {
            file.text();
            bool output = file.number() != 0;
            size_t size = file.number();
            std::string content = output ? std::string() : file.text();
            sizes.push_back(output ? size : content.size());
            must(cudaMalloc(&buffer, sizes.back() ? sizes.back() : 1), "cudaMalloc");
            if (output) must(cudaMemset(buffer, 0xff, size), "cudaMemset");
            else must(cudaMemcpy(buffer, content.data(), content.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
        }
        std::vector<std::string> launched;
        unsigned launches = file.number();
        for (unsigned l = 0; l < launches; l++) {
            std::string name = file.text();
            unsigned x = file.number(), y = file.number(), z = file.number();
            unsigned threads = file.number(), bytes = file.number();
            Bindings bound = {{}, file.number(), bytes / 4};
            if (bound.count > 16) exit((printf("FAILED %s: more buffers than 16\n", what.c_str()), 1));
            for (unsigned b = 0; b < bound.count; b++) {
                bound.buffers[b] = buffers[file.number()];
                file.number();
            }
            if (!entries().count(name)) exit((printf("FAILED %s: no kernel %s\n", what.c_str(), name.c_str()), 1));
            entries()[name]<<<dim3(x, y, z), threads, bytes>>>(bound);
            must(cudaGetLastError(), what + ", " + name);
            launched.push_back(name);
        }
        must(cudaDeviceSynchronize(), what);
        double worst = 0;
        for (size_t b = 0; b < buffers.size(); b++) {
            uint32_t type = file.number();
            if (type != NOT_COMPARED) {
                float limit;
                uint32_t bits = file.number();
                memcpy(&limit, &bits, 4);
                std::string want_bytes = file.text(), got_bytes(sizes[b], '\0');
                must(cudaMemcpy(&got_bytes[0], buffers[b], sizes[b], cudaMemcpyDeviceToHost), "cudaMemcpy");
                std::vector<double> got = values(got_bytes, type), want = values(want_bytes, type);
                double difference = 0, largest = 0;
                for (size_t e = 0; e < want.size(); e++) {
                    bool same = got[e] == want[e] || (std::isnan(got[e]) && std::isnan(want[e]));
                    double d = same ? 0 : std::fabs(got[e] - want[e]);
                    difference = d <= difference ? difference : d;  // NaN stays
                    if (std::isfinite(want[e])) largest = std::fmax(largest, std::fabs(want[e]));
                }
                double share = difference == 0 ? 0 : difference / largest / limit;
                if (!(share <= worst)) worst = share;
            }
            must(cudaFree(buffers[b]), "cudaFree");
        }
        fclose(file.file);
        if (!(worst <= 1)) {
            printf("FAILED %s: %.3g times the tolerance\n", what.c_str(), worst);
            wrong++;
        }
        for (const std::string& name : launched) {
            Tally& tally = kernels[name];
            tally.launches++;
            if (!(worst <= tally.error)) tally.error = worst;
        }
    }
    for (const auto& kernel : kernels)
        printf("%-40s %4u launches, error at most %.2f of the tolerance\n", kernel.first.c_str(), kernel.second.launches,
               kernel.second.error);
    for (const auto& entry : entries())
        if (!kernels.count(entry.first)) {
            printf("FAILED: no case launches %s\n", entry.first.c_str());
            wrong++;
        }
    printf("%d cases, %zu of %zu kernels, %u failed\n", count - 1, kernels.size(), entries().size(), wrong);
    return wrong > 0;
}
