// The operations between the matrix products of a training step, as ops/ defines them: RMSNorm, rotary embedding,
// SwiGLU and their gradients, dropout, and the loss.
//
// A definition makes one pass over memory for each product and sum. Here every element is read once, processed in fp32
// registers and written once. It is rounded to 16 bits wherever the definition rounds, so rotations and dropout agree
// with their definitions bit for bit. The other operations differ in two things: sums are taken in fp64, which leaves
// them right to half a unit, and the exponential is the one below. The caller, in Python, checks the sizes behind the
// pointers.

#include "blocks.h"

namespace {

// ---- RMSNorm -----------------------------------------------------------------------------------------------------

// A sum in fp64, rounded once to fp32 at the end. In fp64 the order of addition hardly shows.
class Sum {
    typedef double Doubles __attribute__((vector_size(4 * LANES)));
    typedef float HalfFloats __attribute__((vector_size(2 * LANES)));
    Doubles low{}, high{};

   public:
    void add(Floats values) {
        HalfFloats halves[2];
        memcpy(halves, &values, sizeof values);
        low += __builtin_convertvector(halves[0], Doubles);
        high += __builtin_convertvector(halves[1], Doubles);
    }

    double total() const {
        Doubles both = low + high;
        double result = 0;
        for (int lane = 0; lane < LANES / 2; ++lane) result += both[lane];
        return result;
    }

    float mean(int64_t count) const { return (float)total() / (float)count; }
};

template <class X, class Y>
void normalize(const X* x, const float* weight, float eps, int64_t size, Y* y, float* rstd) {
    Sum squares;
    for_lanes(size, [&](int64_t i, auto lanes) {
        Floats wide = load(x + i, lanes);
        squares.add(wide * wide);
    });
    *rstd = 1.0f / __builtin_sqrtf(squares.mean(size) + eps);
    for_lanes(size, [&](int64_t i, auto lanes) {
        store(rounded<X>(load(x + i, lanes) * *rstd) * load(weight + i, lanes), y + i, lanes);
    });
}

template <class X, class Y>
void normalize_backward(const Y* dy, const X* x, const float* weight, float rstd, int64_t size, X* dx) {
    Sum products;
    for_lanes(size, [&](int64_t i, auto lanes) {
        Floats g = rounded<Y>(load(dy + i, lanes) * load(weight + i, lanes));
        products.add(g * (load(x + i, lanes) * rstd));
    });
    float mean = products.mean(size);
    for_lanes(size, [&](int64_t i, auto lanes) {
        Floats g = rounded<Y>(load(dy + i, lanes) * load(weight + i, lanes));
        Floats normed = load(x + i, lanes) * rstd;
        store((g - normed * mean) * rstd, dx + i, lanes);
    });
}

// Call body with null pointers of x's type and y's type; y's is x's or fp32.
template <class Body>
void with_dtypes(int x, int y, const Body& body) {
    with_dtype(x, [&](auto* type) {
        if (y == x)
            body(type, type);
        else
            body(type, (float*)nullptr);
    });
}

// ---- rotary embedding --------------------------------------------------------------------------------------------

// One head of one token. Backward rotates by the negative angle, which flips the sign of the sine.
template <class Type>
void rotate(const Type* x, const Type* cos, const Type* sin, bool backward, int64_t half, Type* out) {
    for_lanes(half, [&](int64_t i, auto lanes) {
        int64_t j = i + half;
        Floats first = load(x + i, lanes), second = load(x + j, lanes);
        Floats sin_first = load(sin + i, lanes), sin_second = load(sin + j, lanes);
        if (backward) sin_first = -sin_first, sin_second = -sin_second;
        Floats kept_first = rounded<Type>(first * load(cos + i, lanes));
        Floats kept_second = rounded<Type>(second * load(cos + j, lanes));
        store(kept_first - rounded<Type>(second * sin_first), out + i, lanes);
        store(kept_second + rounded<Type>(first * sin_second), out + j, lanes);
    });
}

// ---- SwiGLU ------------------------------------------------------------------------------------------------------

constexpr int64_t SPAN = 1024;  // consecutive elements that one thread takes

// e^x within one unit in the last place, for x above -87; e^-87 below. e^x = 2^n e^r with |r| <= ln(2) / 2.
inline Floats exponential(Floats x) {
    constexpr float SHIFT = 0x1.8p23f + 126;  // adding it leaves n + 126 in the last bits
    x = clamped(x, -87.0f, 89.0f);            // e^89 is inf
    Floats shifted = x * 0x1.715476p+0f + SHIFT, n = shifted - SHIFT;
    Floats r = (x - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;  // ln(2) in two parts, the first product exact
    // The minimax polynomial of relative error 2^-28 among those that begin with 1 + r.
    Floats q = (((0x1.6a2352p-10f * r + 0x1.123a6cp-7f) * r + 0x1.5558f4p-5f) * r + 0x1.555490p-3f) * r + 0x1.fffffcp-2f;
    Floats power = r * r * q + r + 1.0f;
    return (power + power) * (Floats)((Words)shifted << 23);  // times 2^(n - 1), as there is no 2^128
}

// silu(gate) = gate / (1 + e^-gate), rounded as in a tensor of this type.
template <class Type>
Floats silu(Floats gate, Floats one_plus_exponential) {
    return rounded<Type>(gate / one_plus_exponential);
}

template <class Type>
void activate(const Type* gate, const Type* up, int64_t count, Type* y) {
    for_lanes(count, [&](int64_t i, auto lanes) {
        Floats g = load(gate + i, lanes);
        store(silu<Type>(g, 1.0f + exponential(-g)) * load(up + i, lanes), y + i, lanes);
    });
}

template <class Type>
void activate_backward(const Type* dy, const Type* gate, const Type* up, int64_t count, Type* dgate, Type* dup) {
    for_lanes(count, [&](int64_t i, auto lanes) {
        Floats d = load(dy + i, lanes), g = load(gate + i, lanes);
        Floats e = 1.0f + exponential(-g), sigmoid = 1.0f / e;
        Floats product = rounded<Type>(d * load(up + i, lanes));
        store(product * sigmoid * (1.0f + g * (1.0f - sigmoid)), dgate + i, lanes);
        store(silu<Type>(g, e) * d, dup + i, lanes);
    });
}

// ---- dropout -----------------------------------------------------------------------------------------------------

// Philox4x32-10 of the counters `first` + lane. `first` is a multiple of LANES, so all lanes share the higher word.
inline void philox(int64_t first, uint64_t key, Words words[4]) {
    constexpr uint32_t LANE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Words a = load_bits<Words>(LANE) + (uint32_t)first, b = Words{} + (uint32_t)(first >> 32), c{}, d{};
    uint32_t one = (uint32_t)key, two = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round, one += 0x9E3779B9, two += 0xBB67AE85) {
        Words left, left_low, right, right_low;
        multiply(a, 0xD2511F53, left, left_low);
        multiply(c, 0xCD9E8D57, right, right_low);
        a = right ^ b ^ one, b = right_low;
        c = left ^ d ^ two, d = left_low;
    }
    words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

constexpr int64_t GROUP = 64;  // elements that share 16 counters of four words

// x and y hold a whole group.
template <class Type>
void drop_group(const Type* x, int64_t group, uint64_t key, uint32_t threshold, Type* y) {
    using Bits = std::conditional_t<sizeof(Type) == 4, Words, Halves>;
    for (int64_t lane = 0; lane < 16; lane += LANES) {
        Words words[4];
        philox(16 * group + lane, key, words);
        for (int64_t word = 0; word < 4; ++word) {
            const Bits keep = __builtin_convertvector((Words)(words[word] >= threshold), Bits);
            const Bits kept = load_bits<Bits>(x + 16 * word + lane) & keep;
            memcpy(y + 16 * word + lane, &kept, sizeof kept);
        }
    }
}

// ---- cross-entropy -----------------------------------------------------------------------------------------------

// Lanes without an element become `other`, which does not affect the result.
inline Floats filled(Floats values, Whole, float) { return values; }
inline Floats filled(Floats values, Part part, float other) {
    for (int lane = part.count; lane < LANES; ++lane) values[lane] = other;
    return values;
}

// -log softmax(x)[target]. With `gradient`, x becomes softmax(x) - onehot(target). Computing the exponentials twice is
// faster than keeping them.
template <class Type>
float cross_entropy_of(Type* x, int64_t size, int64_t target, bool gradient) {
    constexpr float LEAST = -__builtin_inff();
    Floats most = Floats{} + LEAST;
    for_lanes(size, [&](int64_t i, auto lanes) {
        Floats values = filled(load(x + i, lanes), lanes, LEAST);
        most = values > most ? values : most;
    });
    float top = LEAST;
    for (int lane = 0; lane < LANES; ++lane) top = std::max(top, most[lane]);
    Sum sum;
    for_lanes(size, [&](int64_t i, auto lanes) {
        sum.add(filled(exponential(load(x + i, lanes) - top), lanes, 0));
    });
    const double total = sum.total();
    const Floats chosen = load(x + target, Part{1});
    if (gradient) {
        const float scale = (float)(1 / total);
        for_lanes(size, [&](int64_t i, auto lanes) {
            store(exponential(load(x + i, lanes) - top) * scale, x + i, lanes);
        });
        store(exponential(chosen - top) * scale - 1.0f, x + target, Part{1});
    }
    return (float)(__builtin_log(total) + top - chosen[0]);
}

}  // namespace

extern "C" {

void cross_entropy(void* logits, int dtype, int64_t rows, int64_t size, const int64_t* targets, int with_gradient,
                   float* losses, Fork fork, unsigned threads) {
    with_dtype(dtype, [&](auto* type) {
        for_blocks(rows * size, size, {fork, threads}, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                losses[row] = cross_entropy_of((decltype(type))logits + row * size, size, targets[row], with_gradient);
        });
    });
}

void rms_norm(const void* x, int x_dtype, const float* weight, float eps, int64_t rows, int64_t size, void* y,
              int y_dtype, float* rstd, Fork fork, unsigned threads) {
    with_dtypes(x_dtype, y_dtype, [&](auto* x_type, auto* y_type) {
        auto* source = (decltype(x_type))x;
        auto* target = (decltype(y_type))y;
        for_blocks(rows * size, size, {fork, threads}, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                normalize(source + row * size, weight, eps, size, target + row * size, rstd + row);
        });
    });
}

void rms_norm_backward(const void* dy, int y_dtype, const void* x, int x_dtype, const float* weight, const float* rstd,
                       int64_t rows, int64_t size, void* dx, Fork fork, unsigned threads) {
    with_dtypes(x_dtype, y_dtype, [&](auto* x_type, auto* y_type) {
        auto* above = (decltype(y_type))dy;
        auto* source = (decltype(x_type))x;
        auto* target = (decltype(x_type))dx;
        for_blocks(rows * size, size, {fork, threads}, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                int64_t at = row * size;
                normalize_backward(above + at, source + at, weight, rstd[row], size, target + at);
            }
        });
    });
}

// x is (tokens, heads, size) with strides for the first two, in elements; out is contiguous.
void rope(const void* x, int dtype, int64_t tokens, int64_t heads, int64_t size, int64_t token_stride,
          int64_t head_stride, const void* cos, const void* sin, int backward, void* out, Fork fork, unsigned threads) {
    with_dtype(dtype, [&](auto* type) {
        using Type = decltype(type);
        for_blocks(tokens * heads * size, heads * size, {fork, threads}, [&](int64_t first, int64_t last) {
            for (int64_t token = first; token < last; ++token)
                for (int64_t head = 0; head < heads; ++head)
                    rotate((Type)x + token * token_stride + head * head_stride, (Type)cos + token * size,
                           (Type)sin + token * size, backward, size / 2, (Type)out + (token * heads + head) * size);
        });
    });
}

void swiglu(const void* gate, const void* up, int dtype, int64_t count, void* y, Fork fork, unsigned threads) {
    with_dtype(dtype, [&](auto* type) {
        using Type = decltype(type);
        for_blocks(count, SPAN, {fork, threads}, [&](int64_t first, int64_t last) {
            int64_t at = first * SPAN, size = std::min(last * SPAN, count) - at;
            activate((Type)gate + at, (Type)up + at, size, (Type)y + at);
        });
    });
}

void drop(const void* x, int dtype, int64_t count, int64_t seed, unsigned threshold, void* y, Fork fork,
          unsigned threads) {
    with_dtype(dtype, [&](auto* type) {
        using Type = decltype(type);
        for_blocks(count, GROUP, {fork, threads}, [&](int64_t first, int64_t last) {
            const int64_t whole = std::min(last, count / GROUP);
            for (int64_t group = first; group < whole; ++group)
                drop_group((Type)x + group * GROUP, group, (uint64_t)seed, threshold, (Type)y + group * GROUP);
            if (whole == last) return;
            std::remove_pointer_t<Type> part[GROUP]{};  // the elements after the last whole group
            const int64_t size = (count - whole * GROUP) * sizeof *part;
            memcpy(part, (Type)x + whole * GROUP, size);
            drop_group(part, whole, (uint64_t)seed, threshold, part);
            memcpy((Type)y + whole * GROUP, part, size);
        });
    });
}

void swiglu_backward(const void* dy, const void* gate, const void* up, int dtype, int64_t count, void* dgate, void* dup,
                     Fork fork, unsigned threads) {
    with_dtype(dtype, [&](auto* type) {
        using Type = decltype(type);
        for_blocks(count, SPAN, {fork, threads}, [&](int64_t first, int64_t last) {
            int64_t at = first * SPAN, size = std::min(last * SPAN, count) - at;
            activate_backward((Type)dy + at, (Type)gate + at, (Type)up + at, size, (Type)dgate + at, (Type)dup + at);
        });
    });
}

}  // extern "C"
