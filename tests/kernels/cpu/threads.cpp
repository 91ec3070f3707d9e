// Runs every C++ operation in eight threads, from several callers at once, on inputs they share: for ThreadSanitizer.
//
// libgomp is not instrumented, so the sanitizer cannot see what orders its threads. Here threads are started and joined
// by `fork_threads`, in the place of GOMP_parallel, which the sanitizer can see. Results must be those of one thread, bit
// for bit. Prints the operations covered. With the argument `race` it does what must be reported instead.
//
// Compiled, together with the sources of the library, and run by test_sanitizers.py.

#include "blocks.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

extern "C" {
void quantize_4bit(const void* x, int dtype, int64_t count, int64_t block_size, const float* boundaries,
                   const uint8_t* order, int boundary_count, uint8_t* packed, float* absmax, Fork, unsigned);
void quantize_8bit(const void* x, int dtype, int64_t count, int64_t block_size, const float* boundaries,
                   int boundary_count, uint8_t* codes, float* absmax, Fork, unsigned);
void dequantize_8bit(const uint8_t* codes, const float* codebook, const float* absmax, int64_t count,
                     int64_t block_size, float* out, Fork, unsigned);
void dequantize_4bit(const uint8_t* packed, const float* codebook, const void* scales, const float* nested_codebook,
                     const float* nested_absmax, const float* offset, int64_t nested_block_size, int64_t block_size,
                     int64_t count, void* out, int dtype, Fork, unsigned);
void dequantize_part(const uint8_t* packed, const float* codebook, const void* scales, const float* nested_codebook,
                     const float* nested_absmax, const float* offset, int64_t nested_block_size, int64_t block_size,
                     int64_t columns, int64_t first_row, int64_t rows, int64_t first_column, int64_t width, void* out,
                     int dtype, Fork, unsigned);
void linear_4bit(const void* x, int dtype, int64_t tokens, const uint8_t* packed, const float* codebook,
                 const void* scales, const float* nested_codebook, const float* nested_absmax, const float* offset,
                 int64_t nested_block_size, int64_t block_size, int64_t rows, int64_t columns, const void* bias,
                 void* y, Fork, unsigned);
void adamw_8bit(void* parameter, const void* gradient, int dtype, int64_t count, uint8_t* first, float* first_absmax,
                uint8_t* second, float* second_absmax, const float* first_values, const float* first_boundaries,
                const float* second_values, const float* second_boundaries, float beta1, float rest1, float beta2,
                float rest2, float keep, float step_size, float root_scale, float eps, Fork, unsigned);
void rms_norm(const void* x, int x_dtype, const float* weight, float eps, int64_t rows, int64_t size, void* y,
              int y_dtype, float* rstd, Fork, unsigned);
void rms_norm_backward(const void* dy, int y_dtype, const void* x, int x_dtype, const float* weight, const float* rstd,
                       int64_t rows, int64_t size, void* dx, Fork, unsigned);
void rope(const void* x, int dtype, int64_t tokens, int64_t heads, int64_t size, int64_t token_stride,
          int64_t head_stride, const void* cos, const void* sin, int backward, void* out, Fork, unsigned);
void cross_entropy(void* logits, int dtype, int64_t rows, int64_t size, const int64_t* targets, int with_gradient,
                   float* losses, Fork, unsigned);
void swiglu(const void* gate, const void* up, int dtype, int64_t count, void* y, Fork, unsigned);
void drop(const void* x, int dtype, int64_t count, int64_t seed, unsigned threshold, void* y, Fork, unsigned);
void swiglu_backward(const void* dy, const void* gate, const void* up, int dtype, int64_t count, void* dgate, void* dup,
                     Fork, unsigned);
}

namespace {

constexpr int64_t COUNT = (1 << 20) + 77, BLOCK = 64, BLOCKS = (COUNT + BLOCK - 1) / BLOCK;
constexpr int64_t COLUMNS = 320, ROWS = COUNT / COLUMNS;  // of the same elements as a matrix
constexpr int64_t SIZE = 576, TOKENS = COUNT / SIZE;  // of hidden states
constexpr unsigned THREADS = 8, CALLERS = 3;

// None begins before all are there, or the first would have done the work before the last is started.
void fork_threads(void (*function)(void*), void* argument, unsigned count, unsigned) {
    std::atomic<unsigned> missing{count};
    auto work = [&] {
        for (--missing; missing;) std::this_thread::yield();
        function(argument);
    };
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < count; ++i) threads.emplace_back(work);
    for (auto& thread : threads) thread.join();
}

// ---- what the operations read ------------------------------------------------------------------------------------

using Numbers = std::vector<float>;
using Codes = std::vector<uint8_t>;

Numbers waves(int64_t count, float offset = 0) {
    Numbers values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = offset + std::sin(0.37f * i) * (1 + i % 11);
    return values;
}

Numbers ramp(int64_t count) {
    Numbers values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = (2 * i + 1.0f) / count - 1;
    return values;
}

Codes bytes(int64_t count) {
    Codes values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = i * 37 >> 3;
    return values;
}

const Numbers numbers = waves(COUNT), scales = waves(BLOCKS, 20), boundaries = ramp(255), codebook = ramp(256);
const Codes codes = bytes(COUNT);
const std::vector<uint16_t> rounded = [] {  // `numbers` in bf16
    std::vector<uint16_t> values(COUNT);
    for (int64_t i = 0; i < COUNT; ++i) values[i] = ((const uint16_t*)numbers.data())[2 * i + 1];
    return values;
}();

// ---- the operations: each returns the bytes that it wrote ---------------------------------------------------------

template <class... Parts>
std::string joined(const Parts&... parts) {
    return (std::string((const char*)parts.data(), parts.size() * sizeof(parts[0])) + ...);
}

struct Operation {
    const char* name;
    std::function<std::string(Fork, unsigned)> run;
};

const Operation operations[] = {
    {"quantize_4bit",
     [](Fork fork, unsigned threads) {
         Codes packed((COUNT + 1) / 2);
         Numbers absmax(BLOCKS);
         quantize_4bit(numbers.data(), FLOAT32, COUNT, BLOCK, boundaries.data(), codes.data(), 15, packed.data(),
                       absmax.data(), fork, threads);
         return joined(packed, absmax);
     }},
    {"quantize_8bit",
     [](Fork fork, unsigned threads) {
         Codes found(COUNT);
         Numbers absmax(BLOCKS);
         quantize_8bit(numbers.data(), FLOAT32, COUNT, BLOCK, boundaries.data(), 255, found.data(), absmax.data(), fork,
                       threads);
         return joined(found, absmax);
     }},
    {"dequantize_8bit",
     [](Fork fork, unsigned threads) {
         Numbers out(COUNT);
         dequantize_8bit(codes.data(), codebook.data(), scales.data(), COUNT, BLOCK, out.data(), fork, threads);
         return joined(out);
     }},
    {"dequantize_4bit",
     [](Fork fork, unsigned threads) {
         Numbers plain(COUNT), nested(COUNT);
         dequantize_4bit(codes.data(), codebook.data(), scales.data(), nullptr, nullptr, nullptr, 1, BLOCK, COUNT,
                         plain.data(), FLOAT32, fork, threads);
         dequantize_4bit(codes.data(), codebook.data(), codes.data(), codebook.data(), scales.data(), scales.data(), 256,
                         BLOCK, COUNT, nested.data(), FLOAT32, fork, threads);
         return joined(plain, nested);
     }},
    {"dequantize_part",
     [](Fork fork, unsigned threads) {
         Numbers out((ROWS - 5) * (COLUMNS - 64));
         dequantize_part(codes.data(), codebook.data(), codes.data(), codebook.data(), scales.data(), scales.data(), 256,
                         BLOCK, COLUMNS, 3, ROWS - 5, 64, COLUMNS - 64, out.data(), FLOAT32, fork, threads);
         return joined(out);
     }},
    {"linear_4bit",
     [](Fork fork, unsigned threads) {
         std::string all;
         for (int64_t tokens : {1, 3, 19}) {
             Numbers y(tokens * ROWS);
             linear_4bit(numbers.data(), FLOAT32, tokens, codes.data(), codebook.data(), scales.data(), nullptr, nullptr,
                         nullptr, 1, BLOCK, ROWS, COLUMNS, numbers.data(), y.data(), fork, threads);
             std::vector<uint16_t> halves(tokens * ROWS);
             linear_4bit(rounded.data(), BFLOAT16, tokens, codes.data(), codebook.data(), scales.data(), nullptr,
                         nullptr, nullptr, 1, BLOCK, ROWS, COLUMNS, rounded.data(), halves.data(), fork, threads);
             all += joined(y, halves);
         }
         return all;
     }},
    {"adamw_8bit",
     [](Fork fork, unsigned threads) {
         Numbers parameter = numbers, first_absmax = scales, second_absmax = scales;
         Codes first = codes, second = codes;
         adamw_8bit(parameter.data(), numbers.data(), FLOAT32, COUNT, first.data(), first_absmax.data(), second.data(),
                    second_absmax.data(), codebook.data(), boundaries.data(), codebook.data(), boundaries.data(), 0.9f,
                    0.1f, 0.99f, 0.01f, 0.999f, 1e-3f, 1.5f, 1e-8f, fork, threads);
         return joined(parameter, first, first_absmax, second, second_absmax);
     }},
    {"rms_norm",
     [](Fork fork, unsigned threads) {
         Numbers y(TOKENS * SIZE), rstd(TOKENS);
         rms_norm(numbers.data(), FLOAT32, scales.data(), 1e-5f, TOKENS, SIZE, y.data(), FLOAT32, rstd.data(), fork,
                  threads);
         return joined(y, rstd);
     }},
    {"rms_norm_backward",
     [](Fork fork, unsigned threads) {
         Numbers dx(TOKENS * SIZE);
         rms_norm_backward(numbers.data() + 1, FLOAT32, numbers.data(), FLOAT32, scales.data(), scales.data(), TOKENS,
                           SIZE, dx.data(), fork, threads);
         return joined(dx);
     }},
    {"rope",
     [](Fork fork, unsigned threads) {
         constexpr int64_t HEADS = 9, HEAD = SIZE / HEADS;
         Numbers out(TOKENS * SIZE);
         rope(numbers.data(), FLOAT32, TOKENS, HEADS, HEAD, SIZE, HEAD, numbers.data(), numbers.data() + 7, true,
              out.data(), fork, threads);
         return joined(out);
     }},
    {"cross_entropy",
     [](Fork fork, unsigned threads) {
         Numbers logits = numbers, losses(ROWS);
         std::vector<int64_t> targets(ROWS, COLUMNS / 2);
         cross_entropy(logits.data(), FLOAT32, ROWS, COLUMNS, targets.data(), 1, losses.data(), fork, threads);
         return joined(logits, losses);
     }},
    {"swiglu",
     [](Fork fork, unsigned threads) {
         Numbers y(COUNT - 1);
         swiglu(numbers.data(), numbers.data() + 1, FLOAT32, COUNT - 1, y.data(), fork, threads);
         return joined(y);
     }},
    {"drop",
     [](Fork fork, unsigned threads) {
         Numbers y(COUNT);
         drop(numbers.data(), FLOAT32, COUNT, 7, 1u << 30, y.data(), fork, threads);
         return joined(y);
     }},
    {"swiglu_backward",
     [](Fork fork, unsigned threads) {
         Numbers dgate(COUNT - 2), dup(COUNT - 2);
         swiglu_backward(numbers.data(), numbers.data() + 1, numbers.data() + 2, FLOAT32, COUNT - 2, dgate.data(),
                         dup.data(), fork, threads);
         return joined(dgate, dup);
     }},
};

// Whether every caller gets what one thread alone computes.
bool holds(const Operation& operation) {
    std::string expected = operation.run(nullptr, 1), found[CALLERS];
    std::vector<std::thread> callers;
    for (auto& mine : found)
        callers.emplace_back([&operation, &mine] { mine = operation.run(fork_threads, THREADS); });
    for (auto& caller : callers) caller.join();
    return std::all_of(found, found + CALLERS, [&](const std::string& mine) { return mine == expected; });
}

// Threads that write to one place: the sanitizer must report it, or it would report nothing.
int race() {
    int64_t blocks = 0;
    for_blocks(COUNT, BLOCK, {fork_threads, THREADS}, [&](int64_t first, int64_t last) {
        blocks += last - first;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    return blocks == 0;
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1 && std::string(arguments[1]) == "race") return race();
    for (const auto& operation : operations) {
        if (!holds(operation)) {
            std::fprintf(stderr, "%s: threads show in the result\n", operation.name);
            return 1;
        }
        std::printf("%s\n", operation.name);
    }
}
