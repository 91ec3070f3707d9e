// The operations of reference.py on the CPU, bit for bit, as a shared library with a plain C interface.
//
// Nothing here may change a result: fp32 throughout, a true division for the reciprocal, one rounding at the end, no
// flushing of subnormals, and flags that keep the compiler from contracting a * b + c. The sizes and dtypes of what the
// pointers point at are checked by the caller, in Python.

#include "blocks.h"

#include <type_traits>

namespace {

// ---- quantization ------------------------------------------------------------------------------------------------

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
    Ranks ranks(boundaries, boundary_count);
    with_dtype(dtype, [&](auto* type) {
        auto* source = (decltype(type))x;
        for_blocks(count, block_size, {fork, threads}, [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                int64_t start = block * block_size, size = std::min(block_size, count - start);
                ranks.quantize(source + start, size, codes + start, absmax + block);
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
