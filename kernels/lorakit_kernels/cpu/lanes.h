// One register of elements at a time, in the vector types that GCC and Clang share. Ordinary operators on them become
// instructions of the set that the flags name. Intrinsics are used where these types cannot express the instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pairs of codes are packed and spread by shifting lanes in little-endian order"
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE2, NEON
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Pairs __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES / 2)));

// The storage of 16-bit floats, as types that overloads can tell apart.
struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class Vector>
static inline Vector load_bits(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

// ---- to fp32, exactly --------------------------------------------------------------------------------------------

static inline Floats load(const float* from) { return load_bits<Floats>(from); }

// Spelled out, because GCC 12 turns the conversion into four instructions.
static inline Words widen(const void* from) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32(load_bits<__m256i>(from));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32(load_bits<__m128i>(from));
#else
    return __builtin_convertvector(load_bits<Halves>(from), Words);
#endif
}

static inline Floats load(const Bfloat16* from) { return (Floats)(widen(from) << 16); }

static inline Floats load(const Float16* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load_bits<__m256i>(from));
#else
    // Moving exponent and mantissa to fp32's positions makes a float that is 2^112 too small, whatever its exponent.
    Words half = widen(from);
    Words magnitude = (Words)((Floats)((half & 0x7fff) << 13) * 0x1p112f);
    Words special = (Words)((half & 0x7c00) == 0x7c00) & 0x7f800000;  // inf and nan keep the highest exponent
    return (Floats)(magnitude | special | (half & 0x8000) << 16);
#endif
}

// ---- from fp32, rounded to nearest, ties to even -----------------------------------------------------------------

static inline void store(Floats value, float* to) { memcpy(to, &value, sizeof value); }

// The higher 16 bits are the result; the lower ones are not cleared.
static inline Words rounded_bfloat16(Floats value) {
    Words bits = (Words)value;
    Words nan = Words{} + 0x7fc00000;  // adding could carry it into inf or zero
    return value != value ? nan : bits + 0x7fff + (bits >> 16 & 1);
}

static inline void store(Floats value, Bfloat16* to) {
    Halves halves = __builtin_convertvector(rounded_bfloat16(value) >> 16, Halves);
    memcpy(to, &halves, sizeof halves);
}

static inline void store(Floats value, Float16* to) {
#if defined(__AVX512F__)
    __m256i halves = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Words bits = (Words)value & 0x7fffffff;
    Floats magnitude = (Floats)bits;
    Words normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;  // rounding may carry to inf, as it should
    Words tiny = (Words)(magnitude + 0.5f) - 0x3f000000;  // 0.5f has the step of fp16's subnormals, 2^-24
    Words is_tiny = (Words)(bits < (113u << 23)), is_huge = (Words)(bits >= (143u << 23));
    Words huge = 0x7c00 | ((Words)(magnitude != magnitude) & 0x200);
    Words rounded = (is_tiny & tiny) | (is_huge & huge) | (~is_tiny & ~is_huge & normal);
    Halves halves = __builtin_convertvector(rounded | ((Words)value >> 16 & 0x8000), Halves);
#endif
    memcpy(to, &halves, sizeof halves);
}

// ---- any number of elements --------------------------------------------------------------------------------------

struct Whole {};
struct Part {
    int64_t count;  // lanes in use, from the first; the others are read as zero and not written
};

template <class Type>
static inline Floats load(const Type* from, Whole) {
    return load(from);
}

template <class Type>
static inline Floats load(const Type* from, Part part) {
    Type lanes[LANES]{};
    memcpy(lanes, from, part.count * sizeof(Type));
    return load(lanes);
}

template <class Type>
static inline void store(Floats value, Type* to, Whole) {
    store(value, to);
}

template <class Type>
static inline void store(Floats value, Type* to, Part part) {
    Type lanes[LANES];
    store(value, lanes);
    memcpy(to, lanes, part.count * sizeof(Type));
}

// Call body(i, lanes) for each register that `count` elements fill. `lanes` is Whole, or Part for a partial last one.
template <class Body>
static inline void for_lanes(int64_t count, const Body& body) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) body(i, Whole{});
    if (i < count) body(i, Part{count - i});
}

// min(max(value, low), high); nan stays nan.
static inline Floats clamped(Floats value, float low, float high) {
#if defined(__AVX512F__)
    return _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), value));
#elif defined(__AVX2__)
    return _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), value));
#else
    value = value < low ? Floats{} + low : value;
    return value > high ? Floats{} + high : value;
#endif
}

// A value rounded to the type and widened again.
template <class Type>
static inline Floats rounded(Floats value) {
    if constexpr (std::is_same_v<Type, Bfloat16>) return (Floats)(rounded_bfloat16(value) & 0xffff0000);
    Type lanes[LANES];
    store(value, lanes);
    return load(lanes);
}

// The halves of each lane's 64-bit product with a factor. One multiplication takes every other lane.
static inline void multiply(Words x, uint32_t factor, Words& high, Words& low) {
#if defined(__AVX512F__)
    const __m512i by = _mm512_set1_epi32((int)factor);
    const __m512 even = (__m512)_mm512_mul_epu32((__m512i)x, by);
    const __m512 odd = (__m512)_mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), by);
    high = (Words)_mm512_mask_movehdup_ps(odd, 0x5555, even);
    low = (Words)_mm512_mask_moveldup_ps(even, 0xaaaa, odd);
#elif defined(__AVX2__)
    const __m256i by = _mm256_set1_epi32((int)factor);
    const __m256i even = _mm256_mul_epu32((__m256i)x, by);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), by);
    high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
    const Pairs even = ((Pairs)x & 0xffffffff) * (uint64_t)factor, odd = ((Pairs)x >> 32) * (uint64_t)factor;
    high = (Words)(even >> 32 | (odd >> 32) << 32);
    low = (Words)((even & 0xffffffff) | odd << 32);
#endif
}

// ---- look-up of 4-bit codes --------------------------------------------------------------------------------------

// Look `count` codes up in a table of 16 entries, the high nibble of each byte first. Entries are moved as bits, with
// one function for 2-byte entries and one for 4-byte entries. Both end with the plain loop over the remaining codes.

template <class Entry>
static inline void look_up_from(int64_t i, const uint8_t* packed, const Entry* table, Entry* out, int64_t count) {
    for (; i + 2 <= count; i += 2) {
        out[i] = table[packed[i / 2] >> 4];
        out[i + 1] = table[packed[i / 2] & 15];
    }
    if (i < count) out[i] = table[packed[i / 2] >> 4];
}

static inline void look_up(const uint8_t* packed, const uint16_t* table, uint16_t* out, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    // Each byte b becomes two indices, b >> 4 and b. The instruction reads the low 5 bits. Bit 4 need not be masked
    // off, since it picks one of two copies of the table.
    __m512i entries = _mm512_broadcast_i64x4(load_bits<__m256i>(table));
    for (; i + 32 <= count; i += 32) {
        __m512i bytes = _mm512_cvtepu8_epi32(load_bits<__m128i>(packed + i / 2));
        __m512i codes = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(codes, entries));
    }
#elif defined(__AVX2__)
    // The instruction looks up bytes, so the low and high bytes of the entries come from two tables.
    __m256i low_bytes = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i entries = load_bits<__m256i>(table);
    __m256i low = _mm256_shuffle_epi8(entries, low_bytes);
    __m256i high = _mm256_shuffle_epi8(_mm256_srli_epi16(entries, 8), low_bytes);
    low = _mm256_permute4x64_epi64(low, 0b10001000);  // both lanes hold all 16
    high = _mm256_permute4x64_epi64(high, 0b10001000);
    for (; i + 32 <= count; i += 32) {
        __m256i bytes = _mm256_cvtepu8_epi16(load_bits<__m128i>(packed + i / 2));
        __m256i codes = _mm256_or_si256(_mm256_srli_epi16(bytes, 4), _mm256_slli_epi16(bytes, 8));
        codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));  // 32 codes, one per byte
        __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
        __m256i even = _mm256_unpacklo_epi8(lows, highs), odd = _mm256_unpackhi_epi8(lows, highs);
        _mm256_storeu_si256((__m256i*)(out + i), _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256((__m256i*)(out + i + 16), _mm256_permute2x128_si256(even, odd, 0x31));
    }
#endif
    look_up_from(i, packed, table, out, count);
}

static inline void look_up(const uint8_t* packed, const uint32_t* table, uint32_t* out, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    __m512i entries = load_bits<__m512i>(table);
    for (; i + 16 <= count; i += 16) {
        __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(packed + i / 2)));
        __m512i codes = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi32(codes, entries));
    }
#elif defined(__AVX2__)
    // The instruction reads the low 3 bits. Bit 3 of the index, moved to the sign, picks the half of the table.
    __m256i first = load_bits<__m256i>(table), second = load_bits<__m256i>(table + 8);
    for (; i + 8 <= count; i += 8) {
        uint32_t four;
        memcpy(&four, packed + i / 2, 4);
        __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128((int)four));
        __m256i codes = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
        __m256i low = _mm256_permutevar8x32_epi32(first, codes), high = _mm256_permutevar8x32_epi32(second, codes);
        __m256 picked = _mm256_blendv_ps((__m256)low, (__m256)high, (__m256)_mm256_slli_epi32(codes, 28));
        _mm256_storeu_ps((float*)(out + i), picked);
    }
#endif
    look_up_from(i, packed, table, out, count);
}
