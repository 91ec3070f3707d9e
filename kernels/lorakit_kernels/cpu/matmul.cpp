// y = x Wᵀ + bias for few tokens and a 4-bit weight, without ever writing the weight's values to memory.
//
// A few rows of W are dequantized piece by piece into the first-level cache, and each piece is multiplied by all tokens
// while it is there. For a single token even these writes are unnecessary. Only the codes move through memory, a
// quarter of a bf16 weight. Sums are in fp32, rounded once.
//
// block_size is a power of two, 64 or more, that divides `columns`.

#include "products.h"

#include <memory>

namespace {

constexpr int ROWS = 4;  // of W at a time
constexpr int TOKENS = 6;  // at a time: 24 sums in 32 registers; 4 tokens are 10% slower
constexpr int64_t WIDTH = 2048;  // columns at a time: in bf16 a piece takes 16 KiB, half of the first-level cache
constexpr int AHEAD = 2 * ROWS;  // how many rows ahead codes are prefetched into the second-level cache
constexpr int MOST_TOKENS = 16;  // tokens whose sums are kept over the columns; more take another pass over the codes

float total(Floats lanes) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(lanes);
#else
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += lanes[lane];
    return sum;
#endif
}

template <class Number>
struct Linear {
    using Product = Products<Number>;

    const Weight& weight;
    const Number* x;  // (tokens, stride), dealt out (see products.h)
    int64_t stride, columns, rows;
    const Number* bias;  // or null
    Number* y;           // (tokens, rows)

    // Rows `first` to before `last`, at most ROWS, for up to MOST_TOKENS tokens.
    void few(int64_t first, int64_t last, int64_t token, int tokens) const {
        alignas(64) Number piece[ROWS * WIDTH];
        Floats sums[MOST_TOKENS][ROWS]{};
        if (last - first < ROWS) memset(piece, 0, sizeof piece);
        for (int64_t column = 0; column < columns; column += WIDTH) {
            const int64_t width = std::min(WIDTH, columns - column), padded = std::min(WIDTH, stride - column);
            for (int64_t row = first; row < last; ++row) {
                const int64_t element = row * columns + column;
                const uint8_t* ahead = weight.packed + (element + AHEAD * columns) / 2;
                for (int64_t i = 0; i < width / 2; i += 64) __builtin_prefetch(ahead + i, 0, 2);
                Product::dequantize(weight, element, width, piece + (row - first) * WIDTH);
            }
            const Number* part = x + token * stride + column;
            for (int done = 0, groups = (tokens + TOKENS - 1) / TOKENS; groups; --groups) {
                const int count = (tokens - done + groups - 1) / groups;  // 16 are 6, 5 and 5
                multiply_all<TOKENS>(count, part + done * stride, piece, padded, sums + done);
                done += count;
            }
        }
        for (int i = 0; i < tokens; ++i)
            for (int64_t row = first; row < last; ++row) finish(sums[i][row - first], token + i, row);
    }

    // Add the products of a piece with `count` tokens to their sums.
    template <int MOST>
    void multiply_all(int count, const Number* part, const Number* piece, int64_t width, Floats (*sums)[ROWS]) const {
        if (count == MOST) return multiply<MOST>(part, piece, width, sums);
        if constexpr (MOST > 1) multiply_all<MOST - 1>(count, part, piece, width, sums);
    }

    template <int COUNT>
    void multiply(const Number* part, const Number* piece, int64_t width, Floats (*sums)[ROWS]) const {
        Floats local[COUNT][ROWS];
        memcpy(local, sums, sizeof local);
        for (int64_t i = 0; i < width; i += Product::STEP) {
            typename Product::Vector w[ROWS];
            for (int row = 0; row < ROWS; ++row) w[row] = Product::read(piece + row * WIDTH + i);
            for (int token = 0; token < COUNT; ++token) {
                auto value = Product::read(part + token * stride + i);
                for (int row = 0; row < ROWS; ++row) Product::add(local[token][row], value, w[row]);
            }
        }
        memcpy(sums, local, sizeof local);
    }

    // ROWS rows from `first`, for a single token.
    void one(int64_t first) const {
        constexpr int64_t WIDE = 16 * WIDTH;  // columns whose scales are expanded at a time
        float expanded[ROWS][WIDE / 64];
        Floats sums[ROWS]{};
        const int shift = __builtin_ctzll(weight.block_size);
        for (int64_t start = 0; start < columns; start += WIDE) {
            const int64_t stop = std::min(start + WIDE, columns);
            const float* absmax[ROWS];
            for (int row = 0; row < ROWS; ++row) {
                int64_t block = (first + row) * (columns >> shift);
                absmax[row] = weight.absmax(block + (start >> shift), block + ((stop - 1) >> shift) + 1, expanded[row]);
            }
            auto add = [&](auto whole, int64_t column) {
                typename Product::Vector values[4], w[4];
                for (int part = 0; part < 4; ++part) values[part] = Product::read(x + column + part * Product::STEP);
                const int64_t low = (column - start) >> shift, high = (column - start + Product::GROUP / 2) >> shift;
                const uint8_t* packed = weight.packed + (first * columns + column) / 2;
                for (int row = 0; row < ROWS; ++row, packed += columns / 2) {
                    __builtin_prefetch(packed + AHEAD * columns / 2, 0, 2);
                    const float last = whole ? absmax[row][high] : 0;
                    Product::template unpack<whole>(weight, packed, absmax[row][low], last, w);
                    for (int part = 0; part < 4; ++part) Product::add(sums[row], values[part], w[part]);
                }
            };
            int64_t column = start;
            for (; column + Product::GROUP <= stop; column += Product::GROUP) add(std::true_type(), column);
            if (column < stop) add(std::false_type(), column);
        }
        for (int row = 0; row < ROWS; ++row) finish(sums[row], 0, first + row);
    }

    void finish(Floats sum, int64_t token, int64_t row) const {
        Number numbers[LANES]{};
        if (bias) numbers[0] = bias[row];
        store(Floats{total(sum)} + load(numbers), numbers);
        y[token * rows + row] = numbers[0];
    }
};

}  // namespace

extern "C" void linear_4bit(const void* x, int dtype, int64_t tokens, const uint8_t* packed, const float* codebook,
                            const void* scales, const float* nested_codebook, const float* nested_absmax,
                            const float* offset, int64_t nested_block_size, int64_t block_size, int64_t rows,
                            int64_t columns, const void* bias, void* y, Fork fork, unsigned threads) {
    const Weight weight{packed, codebook, scales, nested_codebook, nested_absmax, offset, nested_block_size, block_size};
    with_dtype(dtype, [&](auto* type) {
        using Number = std::remove_pointer_t<decltype(type)>;
        using Product = Products<Number>;
        const int64_t stride = (columns + Product::GROUP - 1) / Product::GROUP * Product::GROUP;
        const std::unique_ptr<Number[]> dealt(new Number[tokens * stride]);
        for (int64_t token = 0; token < tokens; ++token)
            Product::deal((const Number*)x + token * columns, columns, dealt.get() + token * stride);
        const Linear<Number> linear{weight, dealt.get(), stride, columns, rows, (const Number*)bias, (Number*)y};
        for_blocks(rows * columns, ROWS * columns, {fork, threads}, [&](int64_t first, int64_t last) {
            for (int64_t row = first * ROWS; row < std::min(last * ROWS, rows); row += ROWS) {
                if constexpr (Product::IN_REGISTERS)
                    if (tokens == 1 && row + ROWS <= rows) {
                        linear.one(row);
                        continue;
                    }
                for (int64_t token = 0; token < tokens; token += MOST_TOKENS)
                    linear.few(row, std::min(row + ROWS, rows), token, (int)std::min<int64_t>(MOST_TOKENS, tokens - token));
            }
        });
    });
}
