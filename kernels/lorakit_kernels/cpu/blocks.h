// Shared by the operations on blocks: threads, dtypes, the scale of a block and its 8-bit codes.
#pragma once

#include "lanes.h"

#include <algorithm>
#include <atomic>

namespace {

// ---- threads -----------------------------------------------------------------------------------------------------

// GOMP_parallel of the OpenMP runtime that the process already has (PyTorch's), or null. Linking with -fopenmp could
// load a second runtime, whose threads would spin against the first one's.
using Fork = void (*)(void (*function)(void*), void* argument, unsigned threads, unsigned flags);

struct Threads {
    Fork fork;
    unsigned count;  // always all of PyTorch's threads: libgomp ends pool threads that a smaller team leaves out
};

constexpr int64_t CHUNK = 1 << 16;     // fewest elements that a thread takes at a time
constexpr int64_t CHUNKS = 64;         // most chunks of an operation, so that they are long enough to prefetch
constexpr int64_t PARALLEL = 1 << 18;  // fewer elements take under 30 us, not worth waking a thread

// Call body(first block, last block) for chunks that cover all blocks. Threads take chunks as they become free, so a
// thread that wakes late on a busy machine does not hold up the others.
template <class Body>
void for_blocks(int64_t count, int64_t block_size, Threads threads, const Body& body) {
    struct Job {
        const Body& body;
        int64_t blocks, step;
        std::atomic<int64_t> next;
    };
    const int64_t chunk = std::max(CHUNK, count / CHUNKS);
    Job job{body, (count + block_size - 1) / block_size, std::max<int64_t>(1, chunk / block_size), {0}};
    auto work = [](void* argument) {
        Job& job = *static_cast<Job*>(argument);
        for (int64_t first; (first = job.next.fetch_add(job.step, std::memory_order_relaxed)) < job.blocks;)
            job.body(first, std::min(first + job.step, job.blocks));
    };
    if (threads.fork && threads.count > 1 && count >= PARALLEL)
        threads.fork(work, &job, threads.count, 0);
    else
        work(&job);
}

// ---- quantization ------------------------------------------------------------------------------------------------

// The largest |x| of a block. Without their sign bits, floats are ordered like integers. nan is above inf, so a block
// with a nan gets a nan, as with torch's amax.
template <class Source>
float largest(const Source* x, int64_t count) {
    Words most{};
    auto take = [&](Floats values) {
        Words bits = (Words)values & 0x7fffffff;
        most = bits > most ? bits : most;
    };
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) take(load(x + i));
    if (i < count) {
        Source rest[LANES]{};
        memcpy(rest, x + i, (count - i) * sizeof(Source));
        take(load(rest));
    }
    uint32_t top = 0;
    for (int lane = 0; lane < LANES; ++lane) top = std::max(top, most[lane]);
    float result;
    memcpy(&result, &top, sizeof result);
    return result;
}

// x / absmax as the definition computes it; zero stays zero even if the reciprocal is inf.
inline Floats scaled(Floats x, float reciprocal) { return (Floats)((Words)(x * reciprocal) & (Words)(x != 0.0f)); }

// Eight-bit codes: the number of boundaries, up to 255, below an element.
struct Ranks {
    float boundaries[255];  // padded with inf, which is below no element
    int last;

    Ranks(const float* from, int count) : last(count) {
        for (int i = 0; i < 255; ++i) boundaries[i] = i < count ? from[i] : __builtin_inff();
    }

    template <class Source>
    void quantize(const Source* x, int64_t count, uint8_t* codes, float* absmax) const {
        constexpr int GROUP = 16;
        *absmax = largest(x, count);
        float reciprocal = 1.0f / *absmax;
        for (int64_t i = 0; i < count; i += GROUP) {
            int64_t size = std::min<int64_t>(GROUP, count - i);
            Source part[GROUP]{};
            float s[GROUP];
            int32_t rank[GROUP]{};
            memcpy(part, x + i, size * sizeof(Source));
            for (int lane = 0; lane < GROUP; lane += LANES) store(scaled(load(part + lane), reciprocal), s + lane);
            // A binary search whose steps are additions. The group takes each step together: one element's steps wait
            // for each other. This takes 5 ns per element instead of 10.
            for (int step = 128; step; step /= 2)
                for (int lane = 0; lane < GROUP; ++lane) {
                    float boundary = boundaries[rank[lane] + step - 1];
                    rank[lane] += step * !(s[lane] <= boundary);
                }
            for (int lane = 0; lane < size; ++lane) codes[i + lane] = std::min(rank[lane], last);
        }
    }
};

// ---- dtypes ------------------------------------------------------------------------------------------------------

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };

// Call body with a null pointer of the dtype's type.
template <class Body>
void with_dtype(int dtype, const Body& body) {
    if (dtype == FLOAT32) body((float*)nullptr);
    if (dtype == BFLOAT16) body((Bfloat16*)nullptr);
    if (dtype == FLOAT16) body((Float16*)nullptr);
}

}  // namespace
