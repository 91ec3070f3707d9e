// The operations of reference.py on the CPU, bit for bit, as a shared library with a plain C interface.
//
// Nothing here may change a result: fp32 throughout, a true division for the reciprocal, one rounding at the end, no
// flushing of subnormals, and flags that keep the compiler from contracting a * b + c. The sizes and dtypes of what the
// pointers point at are checked by the caller, __init__.py.

#include "lanes.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

namespace {

// ---- threads -----------------------------------------------------------------------------------------------------

// GOMP_parallel of the OpenMP runtime that the process already has (PyTorch's), or null. Linking with -fopenmp could
// load a second runtime, whose threads would spin against the first one's.
using Fork = void (*)(void (*function)(void*), void* argument, unsigned threads, unsigned flags);

struct Threads {
    Fork fork;
    unsigned count;  // always all of PyTorch's: libgomp ends the threads of its pool that a smaller team leaves out
};

constexpr int64_t CHUNK = 1 << 16;     // elements that a thread takes at a time
constexpr int64_t PARALLEL = 1 << 18;  // fewer take under 30 us, not worth waking a thread

// Call body(first block, last block) for chunks that cover all blocks. Threads take chunks as they become free, so that
// one that wakes late, on a busy machine, holds nobody up.
template <class Body>
void for_blocks(int64_t count, int64_t block_size, Threads threads, const Body& body) {
    struct Job {
        const Body& body;
        int64_t blocks, step;
        std::atomic<int64_t> next;
    };
    Job job{body, (count + block_size - 1) / block_size, std::max<int64_t>(1, CHUNK / block_size), {0}};
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

// The largest |x| of a block. Without their sign bits floats are ordered like integers, and nan is above inf: a block
// with a nan gets a nan, as from torch's amax.
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

// x / absmax as the reference computes it; zero stays zero where the reciprocal is inf.
inline Floats scaled(Floats x, float reciprocal) { return (Floats)((Words)(x * reciprocal) & (Words)(x != 0.0f)); }

// order[number of boundaries below s]. A nan passes all boundaries, as in torch.bucketize: hence "not <=", not ">".
struct Coder {
    float boundaries[16];  // padded with inf, which is below nothing
    uint32_t order[16];    // padded with the last

    Coder(const float* from, const uint8_t* codes, int count) {
        for (int i = 0; i < 16; ++i) {
            boundaries[i] = i < count ? from[i] : __builtin_inff();
            order[i] = codes[std::min(i, count)];
        }
    }

    Words operator()(Floats s) const {
#if defined(__AVX512F__)
        // Binary search, each step a look-up in the register that holds all boundaries.
        __m512 edges = load(boundaries);
        __m512i rank = _mm512_setzero_si512();
        for (int step = 8; step; step /= 2) {
            __m512i middle = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
            __mmask16 above = _mm512_cmp_ps_mask(s, _mm512_permutexvar_ps(middle, edges), _CMP_NLE_UQ);
            rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
        }
        return (Words)_mm512_permutexvar_epi32(rank, load_bits<__m512i>(order));
#else
        // The first code plus a difference for each boundary that is passed: neither branches nor look-ups.
        Words code = Words{} + order[0];
        for (int i = 0; i < 15; ++i) code += ~(Words)(s <= boundaries[i]) & (order[i + 1] - order[i]);
        return code;
#endif
    }
};

// Pack codes two to a byte, the even element in the high nibble.
inline void pack(Words codes, uint8_t* to) {
    Pairs pairs = (Pairs)codes;  // even element | odd element << 32
    Bytes bytes = __builtin_convertvector(pairs << 4 | pairs >> 32, Bytes);
    memcpy(to, &bytes, sizeof bytes);
}

template <class Source>
void quantize_block(const Source* x, int64_t count, const Coder& coder, uint8_t* packed, float* absmax) {
    *absmax = largest(x, count);
    float reciprocal = 1.0f / *absmax;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) pack(coder(scaled(load(x + i), reciprocal)), packed + i / 2);
    if (i < count) {
        Source rest[LANES]{};  // the zeros also give the code that pads an odd count
        uint8_t bytes[LANES / 2];
        memcpy(rest, x + i, (count - i) * sizeof(Source));
        pack(coder(scaled(load(rest), reciprocal)), bytes);
        memcpy(packed + i / 2, bytes, (count - i + 1) / 2);
    }
}

template <class Source>
void rank_block(const Source* x, int64_t count, const float* boundaries, int last, uint8_t* codes, float* absmax) {
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
        // How many of the 255 boundaries (padded with inf) are below s: a binary search whose steps are additions. The
        // group takes each step together, or every one would wait for the one before: 5 ns an element, not 10.
        for (int step = 128; step; step /= 2)
            for (int lane = 0; lane < GROUP; ++lane) {
                float boundary = boundaries[rank[lane] + step - 1];
                rank[lane] += step * !(s[lane] <= boundary);
            }
        for (int lane = 0; lane < size; ++lane) codes[i + lane] = std::min(rank[lane], last);
    }
}

// ---- dequantization ----------------------------------------------------------------------------------------------

// A block has 16 different values at most, so they are multiplied and rounded once a block, not once an element; what
// is left is a look-up.
template <class Target>
void dequantize_block(const uint8_t* packed, const float* codebook, float absmax, Target* out, int64_t count) {
    Target table[16];
    for (int i = 0; i < 16; i += LANES) store(load(codebook + i) * absmax, table + i);
    using Entry = std::conditional_t<sizeof(Target) == 2, uint16_t, uint32_t>;
    look_up(packed, (const Entry*)table, (Entry*)out, count);
}

constexpr int64_t SCALES = 1024;  // that are expanded at a time

// The scales of the blocks from `first` to before `last`, from their codes. Product and sum are rounded each.
inline void expand_scales(const uint8_t* codes, const float* codebook, const float* absmax, float offset,
                          int64_t block_size, int64_t first, int64_t last, float* out) {
    while (first < last) {
        float scale = absmax[first / block_size];
        int64_t stop = std::min((first / block_size + 1) * block_size, last);
        for (; first < stop; ++first) *out++ = codebook[codes[first]] * scale + offset;
    }
}

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };

// Call body with a null pointer of the dtype's type.
template <class Body>
void with_dtype(int dtype, const Body& body) {
    if (dtype == FLOAT32) body((float*)nullptr);
    if (dtype == BFLOAT16) body((Bfloat16*)nullptr);
    if (dtype == FLOAT16) body((Float16*)nullptr);
}

}  // namespace

extern "C" {

void quantize_4bit(const void* x, int dtype, int64_t count, int64_t block_size, const float* boundaries,
                   const uint8_t* order, int boundary_count, uint8_t* packed, float* absmax, Fork fork,
                   unsigned threads) {
    Coder coder(boundaries, order, boundary_count);
    with_dtype(dtype, [&](auto* type) {
        auto* source = (decltype(type))x;
        for_blocks(count, block_size, {fork, threads}, [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                int64_t start = block * block_size, size = std::min(block_size, count - start);
                quantize_block(source + start, size, coder, packed + start / 2, absmax + block);
            }
        });
    });
}

void quantize_8bit(const void* x, int dtype, int64_t count, int64_t block_size, const float* boundaries,
                   int boundary_count, uint8_t* codes, float* absmax, Fork fork, unsigned threads) {
    float padded[255];
    for (int i = 0; i < 255; ++i) padded[i] = i < boundary_count ? boundaries[i] : __builtin_inff();
    with_dtype(dtype, [&](auto* type) {
        auto* source = (decltype(type))x;
        for_blocks(count, block_size, {fork, threads}, [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                int64_t start = block * block_size, size = std::min(block_size, count - start);
                rank_block(source + start, size, padded, boundary_count, codes + start, absmax + block);
            }
        });
    });
}

void dequantize_8bit(const uint8_t* codes, const float* codebook, const float* absmax, int64_t count,
                     int64_t block_size, float* out, Fork fork, unsigned threads) {
    for_blocks(count, block_size, {fork, threads}, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block)
            for (int64_t i = block * block_size; i < std::min((block + 1) * block_size, count); ++i)
                out[i] = codebook[codes[i]] * absmax[block];
    });
}

// Where nested_codebook is null, `scales` are fp32 numbers, else uint8 codes.
void dequantize_4bit(const uint8_t* packed, const float* codebook, const void* scales, const float* nested_codebook,
                     const float* nested_absmax, const float* offset, int64_t nested_block_size, int64_t count,
                     int64_t block_size, void* out, int dtype, Fork fork, unsigned threads) {
    with_dtype(dtype, [&](auto* type) {
        auto* target = (decltype(type))out;
        for_blocks(count, block_size, {fork, threads}, [&](int64_t first, int64_t last) {
            float expanded[SCALES];
            const float* absmax = (const float*)scales + first;
            for (int64_t block = first; block < last; ++block, ++absmax) {
                if (nested_codebook && (block - first) % SCALES == 0) {
                    int64_t stop = std::min(block + SCALES, last);
                    expand_scales((const uint8_t*)scales, nested_codebook, nested_absmax, *offset, nested_block_size,
                                  block, stop, expanded);
                    absmax = expanded;
                }
                int64_t start = block * block_size, size = std::min(block_size, count - start);
                dequantize_block(packed + start / 2, codebook, *absmax, target + start, size);
            }
        });
    });
}

}  // extern "C"
