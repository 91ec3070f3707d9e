// How `linear_4bit` multiplies a dtype: STEP elements at a time, summed in fp32.
//
// Where it is faster, a row of W is dealt out: unpacked in another order within each group of GROUP elements. x is
// dealt out in the same way, and the sum over a group is the same.
#pragma once

#include "dequantize.h"

namespace {

template <class Number>
struct Products {
    static constexpr int STEP = LANES, GROUP = LANES;
    static constexpr bool IN_REGISTERS = false;  // whether `unpack` returns a group of weights without writing it
    using Vector = Floats;

    static Vector read(const Number* from) { return load(from); }

    static void add(Floats& sum, Vector a, Vector b) {
#if defined(__AVX512F__)
        sum = _mm512_fmadd_ps(a, b, sum);
#elif defined(__FMA__)
        sum = _mm256_fmadd_ps(a, b, sum);
#else
        sum += a * b;
#endif
    }

    static void deal(const Number* x, int64_t count, Number* out) { memcpy(out, x, count * sizeof(Number)); }

    static void dequantize(const Weight& weight, int64_t first, int64_t count, Number* out) {
        weight.dequantize(first, first + count, out);
    }
};

#if defined(__AVX512BF16__)
// A register of packed bytes holds 32 numbers of 16 bits, with four codes each. Shifted by 0, 4, 8 and 12 bits, it
// gives four sets of 32 indices, for the elements 4j + 1, 4j, 4j + 3 and 4j + 2. Each set takes one instruction; the
// order of the row would take three. The register's halves lie in two blocks or in one, and their tables share the
// register that is looked up. The table's entries are those of `dequantize_block`, except that the instructions treat
// subnormal numbers as zero.
template <>
struct Products<Bfloat16> {
    static constexpr int STEP = 32, GROUP = 128;
    static constexpr bool IN_REGISTERS = true;
    using Vector = __m512bh;

    static Vector read(const Bfloat16* from) { return load_bits<Vector>(from); }

    static void add(Floats& sum, Vector a, Vector b) { sum = (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }

    static void deal(const Bfloat16* x, int64_t count, Bfloat16* out) {
        for (int64_t start = 0; start < count; start += GROUP) {
            uint64_t fours[GROUP / 4]{};
            memcpy(fours, x + start, std::min<int64_t>(GROUP, count - start) * sizeof *x);
            for (int element : {1, 0, 3, 2})
                for (uint64_t four : fours) (out++)->bits = (uint16_t)(four >> 16 * element);
        }
    }

    // The values of a group, or of half a group if not WHOLE; `low` and `high` are the scales of its halves.
    template <bool WHOLE>
    static void unpack(const Weight& weight, const uint8_t* packed, float low, float high, Vector out[4]) {
        const __m512i words = WHOLE ? load_bits<__m512i>(packed) : _mm512_zextsi256_si512(load_bits<__m256i>(packed));
        const __m512 values = load(weight.codebook);
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(values * high, values * low);
        const __m512i nibbles = _mm512_set1_epi8(15), half = _mm512_set_epi64(HALF, HALF, HALF, HALF, 0, 0, 0, 0);
        const __m512i even = _mm512_ternarylogic_epi32(words, nibbles, half, 0xea);  // words & nibbles | half
        const __m512i odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibbles, half, 0xea);
        out[0] = (Vector)_mm512_permutexvar_epi16(even, table);
        out[1] = (Vector)_mm512_permutexvar_epi16(odd, table);
        out[2] = (Vector)_mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table);
        out[3] = (Vector)_mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table);
    }
    static constexpr int64_t HALF = 0x1010101010101010;  // 16 in each byte: where the second table begins

    static void dequantize(const Weight& weight, int64_t first, int64_t count, Bfloat16* out) {
        float expanded[Weight::SCALES];
        const int shift = __builtin_ctzll(weight.block_size);
        const int64_t block = first >> shift;
        const float* absmax = weight.absmax(block, ((first + count - 1) >> shift) + 1, expanded);
        const int64_t skipped = first - (block << shift);  // of the first block
        auto scale = [&](int64_t element) { return absmax[(skipped + element) >> shift]; };
        const uint8_t* packed = weight.packed + first / 2;
        int64_t i = 0;
        Vector parts[4];
        for (; i + GROUP <= count; i += GROUP) {
            unpack<true>(weight, packed + i / 2, scale(i), scale(i + GROUP / 2), parts);
            memcpy(out + i, parts, sizeof parts);
        }
        if (i < count) {
            unpack<false>(weight, packed + i / 2, scale(i), 0, parts);
            memcpy(out + i, parts, sizeof parts);
        }
    }
};
#endif

}  // namespace
