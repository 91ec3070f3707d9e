// One step of AdamW with its moments in 8 bits, bit for bit as ops/adamw_8bit.py defines it.
//
// A block of both moments, the gradient and the parameter is widened into buffers on the stack, updated, and quantized
// again. Nothing of the parameter's size is allocated, and every number in memory is touched once.

#include "blocks.h"

namespace {

constexpr int64_t BLOCK = 256;  // STATE_BLOCK_SIZE

// The factors that all elements of a step share, rounded to fp32 by the caller.
struct Step {
    float beta1, rest1, beta2, rest2;  // rest = 1 - beta
    float keep, step_size, root_scale, eps;
};

// A moment: its codes and scales, and the codebook's values and boundaries.
struct Moment {
    uint8_t* codes;
    float* absmax;
    const float* values;
    Ranks ranks;

    void read(int64_t block, int64_t count, float* out) const {
        const uint8_t* from = codes + block * BLOCK;
        float scale = absmax[block];
        for (int64_t i = 0; i < count; ++i) out[i] = values[from[i]] * scale;
    }

    void write(int64_t block, int64_t count, const float* moment) const {
        ranks.quantize(moment, count, codes + block * BLOCK, absmax + block);
    }
};

// The operations and their order are those of `adamw` in ops/adamw_8bit.py; each is rounded to fp32.
inline void update(float* p, const float* g, float* m, float* v, const Step& by) {
    for (int64_t i = 0; i < BLOCK; ++i) {
        m[i] = m[i] * by.beta1 + g[i] * by.rest1;
        v[i] = v[i] * by.beta2 + g[i] * g[i] * by.rest2;
        float change = m[i] / (__builtin_sqrtf(v[i]) * by.root_scale + by.eps);
        p[i] = p[i] * by.keep - change * by.step_size;
    }
}

template <class Type>
void widen(const Type* from, int64_t count, float* to) {
    Type part[BLOCK]{};
    memcpy(part, from, count * sizeof(Type));
    for (int64_t i = 0; i < BLOCK; i += LANES) store(load(part + i), to + i);
}

template <class Type>
void narrow(const float* from, int64_t count, Type* to) {
    Type part[BLOCK];
    for (int64_t i = 0; i < BLOCK; i += LANES) store(load(from + i), part + i);
    memcpy(to, part, count * sizeof(Type));
}

}  // namespace

extern "C" void adamw_8bit(void* parameter, const void* gradient, int dtype, int64_t count, uint8_t* first,
                           float* first_absmax, uint8_t* second, float* second_absmax, const float* first_values,
                           const float* first_boundaries, const float* second_values, const float* second_boundaries,
                           float beta1, float rest1, float beta2, float rest2, float keep, float step_size,
                           float root_scale, float eps, Fork fork, unsigned threads) {
    Step by{beta1, rest1, beta2, rest2, keep, step_size, root_scale, eps};
    Moment one{first, first_absmax, first_values, Ranks(first_boundaries, 255)};
    Moment two{second, second_absmax, second_values, Ranks(second_boundaries, 255)};
    with_dtype(dtype, [&](auto* type) {
        auto* target = (decltype(type))parameter;
        auto* source = (decltype(type))gradient;
        for_blocks(count, BLOCK, {fork, threads}, [&](int64_t from, int64_t to) {
            for (int64_t block = from; block < to; ++block) {
                int64_t start = block * BLOCK, size = std::min(BLOCK, count - start);
                float p[BLOCK], g[BLOCK], m[BLOCK]{}, v[BLOCK]{};
                widen(target + start, size, p);
                widen(source + start, size, g);
                one.read(block, size, m);
                two.read(block, size, v);
                update(p, g, m, v, by);
                narrow(p, size, target + start);
                one.write(block, size, m);
                two.write(block, size, v);
            }
        });
    });
}
