// A 4-bit weight and its values. `dequantize_4bit` writes them and `linear_4bit` multiplies by them.
#pragma once

#include "blocks.h"

#include <type_traits>

namespace {

// A block has at most 16 different values, so they are multiplied and rounded once per block, not once per element.
// Each element then takes one look-up.
template <class Target>
void dequantize_block(const uint8_t* packed, const float* codebook, float absmax, Target* out, int64_t count) {
    Target table[16];
    for (int i = 0; i < 16; i += LANES) store(load(codebook + i) * absmax, table + i);
    using Entry = std::conditional_t<sizeof(Target) == 2, uint16_t, uint32_t>;
    look_up(packed, (const Entry*)table, (Entry*)out, count);
}

struct Weight {
    const uint8_t* packed;
    const float* codebook;
    const void* scales;  // fp32 numbers, or uint8 codes if there is a nested codebook
    const float *nested_codebook, *nested_absmax, *offset;
    int64_t nested_block_size, block_size;

    static constexpr int64_t SCALES = 1024;  // scales that are expanded at a time

    // The scales of the blocks from `first` to before `last`, at most SCALES. fp32 scales are returned in place, codes
    // are expanded into `expanded`. Product and sum are each rounded.
    const float* absmax(int64_t first, int64_t last, float* expanded) const {
        if (!nested_codebook) return (const float*)scales + first;
        const uint8_t* codes = (const uint8_t*)scales;
        for (float* out = expanded; first < last;) {
            int64_t nested = first / nested_block_size, stop = std::min((nested + 1) * nested_block_size, last);
            for (; first < stop; ++first) *out++ = nested_codebook[codes[first]] * nested_absmax[nested] + *offset;
        }
        return expanded;
    }

    // Write the values from element `first`, which is even, to before `last`.
    template <class Target>
    void dequantize(int64_t first, int64_t last, Target* out) const {
        float expanded[SCALES];
        const int64_t end = (last + block_size - 1) / block_size;
        for (int64_t block = first / block_size; block < end;) {
            const int64_t stop = std::min(block + SCALES, end);
            for (const float* scale = absmax(block, stop, expanded); block < stop; ++block, ++scale) {
                int64_t count = std::min((block + 1) * block_size, last) - first;
                dequantize_block(packed + first / 2, codebook, *scale, out, count);
                first += count, out += count;
            }
        }
    }
};

}  // namespace
