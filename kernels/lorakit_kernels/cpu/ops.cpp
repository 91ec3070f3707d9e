// The codecs of ops/codec.py on the CPU, bit for bit, as a shared library with a plain C interface.
//
// Nothing here may change a result: fp32 throughout, a true division for the reciprocal, one rounding at the end, no
// flushing of subnormals, and flags that keep the compiler from contracting a * b + c. The caller, in Python, checks
// the sizes and dtypes behind the pointers.

#include "dequantize.h"

namespace {

// ---- quantization ------------------------------------------------------------------------------------------------

// order[number of boundaries below s]. A nan passes all boundaries, as in torch.bucketize: hence "not <=", not ">".
struct Coder {
    float boundaries[16];  // padded with inf, which is below no element
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
        // The first code plus a difference for each boundary passed: neither branches nor look-ups.
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

// The first eight arguments are the fields of `struct Weight`.
void dequantize_4bit(const uint8_t* packed, const float* codebook, const void* scales, const float* nested_codebook,
                     const float* nested_absmax, const float* offset, int64_t nested_block_size, int64_t block_size,
                     int64_t count, void* out, int dtype, Fork fork, unsigned threads) {
    Weight weight{packed, codebook, scales, nested_codebook, nested_absmax, offset, nested_block_size, block_size};
    with_dtype(dtype, [&](auto* type) {
        auto* target = (decltype(type))out;
        for_blocks(count, block_size, {fork, threads}, [&](int64_t first, int64_t last) {
            int64_t start = first * block_size;
            weight.dequantize(start, std::min(last * block_size, count), target + start);
        });
    });
}

// Some rows and columns of a matrix. `columns`, the length of its rows, and `first_column` are even.
void dequantize_part(const uint8_t* packed, const float* codebook, const void* scales, const float* nested_codebook,
                     const float* nested_absmax, const float* offset, int64_t nested_block_size, int64_t block_size,
                     int64_t columns, int64_t first_row, int64_t rows, int64_t first_column, int64_t width, void* out,
                     int dtype, Fork fork, unsigned threads) {
    Weight weight{packed, codebook, scales, nested_codebook, nested_absmax, offset, nested_block_size, block_size};
    with_dtype(dtype, [&](auto* type) {
        auto* target = (decltype(type))out;
        for_blocks(rows * width, width, {fork, threads}, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                int64_t start = (first_row + row) * columns + first_column;
                weight.dequantize(start, start + width, target + row * width);
            }
        });
    });
}

}  // extern "C"
