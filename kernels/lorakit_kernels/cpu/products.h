// How `linear_4bit` multiplies a dtype: STEP elements at a time, summed in fp32.
//
// Where it pays, a row of W is not unpacked in its order but dealt out, in groups of GROUP elements, and x is dealt out
// likewise: the sum over a group does not mind.
#pragma once

#include "dequantize.h"

namespace {

template <class Number>
struct Products {
    static constexpr int STEP = LANES, GROUP = LANES;
    static constexpr bool IN_REGISTERS = false;  // whether `unpack` gives a group of weights without writing it
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
// A register of packed bytes is 32 numbers of 16 bits, of four codes each. Shifted by 0, 4, 8 and 12 bits it is four
// times 32 indices, of the elements 4j + 1, 4j, 4j + 3 and 4j + 2: one instruction each, where the order of the row
// takes three. Its halves lie in two blocks, or both in one, and their tables share the register that is looked up.
// The table's entries are those of `dequantize_block`, but that the instructions take subnormal numbers for zero.
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

    // A group of a row, of which `count` elements, 64 or more, are left; absmax is that of the row's first block.
    static void unpack(const Weight& weight, const uint8_t* packed, int64_t column, int64_t count, int shift,
                       const float* absmax, Vector out[4]) {
        const bool whole = count >= GROUP;
        const __m512i words = _mm512_maskz_loadu_epi64(whole ? 0xff : 0x0f, packed);
        const __m512 values = load(weight.codebook);
        const __m512 low = values * absmax[column >> shift];
        const __m512 high = values * absmax[(column + (whole ? GROUP / 2 : 0)) >> shift];
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        const __m512i code = _mm512_set1_epi16(15), half = _mm512_set_epi64(HALF, HALF, HALF, HALF, 0, 0, 0, 0);
        for (int part = 0; part < 4; ++part) {
            __m512i index = _mm512_srli_epi16(words, 4 * part);
            index = _mm512_ternarylogic_epi32(index, code, half, 0xea);  // index & code | half
            out[part] = (Vector)_mm512_permutexvar_epi16(index, table);
        }
    }
    static constexpr int64_t HALF = 0x0010001000100010;  // 16 in each number: where the second table begins

    static void dequantize(const Weight& weight, int64_t first, int64_t count, Bfloat16* out) {
        float expanded[Weight::SCALES];
        const int shift = __builtin_ctzll(weight.block_size);
        const int64_t block = first >> shift;
        const float* absmax = weight.absmax(block, ((first + count - 1) >> shift) + 1, expanded);
        const int64_t skipped = first - (block << shift);  // of the first block
        for (int64_t i = 0; i < count; i += GROUP) {
            Vector parts[4];
            unpack(weight, weight.packed + (first + i) / 2, skipped + i, count - i, shift, absmax, parts);
            for (int part = 0; part < 4; ++part, out += STEP) memcpy(out, &parts[part], sizeof parts[part]);
        }
    }
};
#endif

}  // namespace
