// TensorFlow operations HpctrainBatchNorm and HpctrainBatchNormGrad: batch normalization in training, with the addition
// of a residual and ReLU in the same passes over memory, for float32 and bfloat16 activations (statistics float32).
//
// Forward:  y = relu((x - mean) * (gamma * rstd) + beta + residual), rstd = 1 / sqrt(biased variance + epsilon).
// Backward: g = the sum of the gradients of y where y > 0; dresidual = g; dbeta = sum(g);
//           dgamma = sum(g * (x - mean)) * rstd;
//           dx = gamma * rstd * (g - dbeta / m - (x - mean) * rstd * dgamma / m), m = the number of rows.
// Without a residual the mask y > 0 is computed again from x, by the same operations as in the forward pass; with one
// it is read from y. Ioffe and Szegedy 2015 (arXiv 1502.03167) has the formulas.
//
// An activation that two layers read can be asked for twice: both outputs are one buffer, and the backward pass adds
// the two gradients as it reads them. Buffers of inputs that nobody needs any more are written over.
//
// Results depend neither on the number of threads (sums are taken over chunks of rows that only the shape decides,
// and added in their order) nor on the CPU: there is no fused multiply-add (-ffp-contract=off), and each channel's
// numbers go through the same operations in the same order whatever the width of the vectors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

#define INLINE inline __attribute__((always_inline))
// Outputs may be the very buffers of inputs, element on element, but never overlap otherwise.
#define VECTORIZE _Pragma("GCC ivdep")

namespace {

namespace tf = tensorflow;

// ---------------------------------------------------------------- processors

// FOR_EACH_CPU(Name, (parameters), arguments) defines Name, which runs NameBody as compiled for the CPU it finds. Not
// target_clones: those for AVX-512 have to do without its instructions for 16-bit numbers.
#if defined(__x86_64__) && defined(__GNUC__)
#define FOR_EACH_CPU(Name, Parameters, ...)                                                                          \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void Name##Avx512 Parameters {                       \
    Name##Body(__VA_ARGS__);                                                                                         \
  }                                                                                                                  \
  __attribute__((target("avx2"))) void Name##Avx2 Parameters { Name##Body(__VA_ARGS__); }                            \
  void Name Parameters {                                                                                             \
    if (kVectors == Vectors::kAvx512) return Name##Avx512(__VA_ARGS__);                                              \
    if (kVectors == Vectors::kAvx2) return Name##Avx2(__VA_ARGS__);                                                  \
    Name##Body(__VA_ARGS__);                                                                                         \
  }

enum class Vectors { kAvx512, kAvx2, kAny };

Vectors VectorsOfThisCpu() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Vectors::kAvx512;
  }
  return __builtin_cpu_supports("avx2") ? Vectors::kAvx2 : Vectors::kAny;
}

const Vectors kVectors = VectorsOfThisCpu();
#else
#define FOR_EACH_CPU(Name, Parameters, ...) \
  void Name Parameters { Name##Body(__VA_ARGS__); }
#endif

// ---------------------------------------------------------------- numbers

struct BFloat16 {
  uint16_t bits;
};

INLINE float Load(float value) { return value; }
INLINE float Load(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

INLINE void Store(float value, float* to) { *to = value; }
INLINE void Store(float value, BFloat16* to) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// ---------------------------------------------------------------- rows

// An array [rows, channels], seen as rows of `width` numbers: several of its rows together where channels are few, so
// that vectors are full. What is left at the end is a narrower row of `tail` numbers.
struct Layout {
  int64_t rows, channels, repeats, width, wide_rows, tail, chunk_rows, chunks;

  Layout(int64_t rows, int64_t channels) : rows(rows), channels(channels) {
    repeats = (kNarrow + channels - 1) / channels;
    width = repeats * channels;
    wide_rows = rows / repeats;
    tail = rows % repeats * channels;
    chunk_rows = std::max(kFewestRows, kChunk / width);
    chunks = std::max<int64_t>(1, (wide_rows + chunk_rows - 1) / chunk_rows);
  }

  // A number per channel, for each number of a wide row.
  std::vector<float> Widen(const float* of_channels) const {
    std::vector<float> wide(width);
    for (int64_t i = 0; i < width; ++i) wide[i] = of_channels[i % channels];
    return wide;
  }

 private:
  static constexpr int64_t kNarrow = 64;          // a wide row has at least as many numbers
  static constexpr int64_t kChunk = 32768;        // about as many numbers are summed up in float32
  static constexpr int64_t kFewestRows = 32;
};

// The wide rows of one chunk, and the numbers of a narrower row after them.
struct Range {
  int64_t begin, end, tail;
};

Range RangeOf(const Layout& layout, int64_t chunk) {
  const int64_t begin = chunk * layout.chunk_rows;
  const int64_t end = std::min(layout.wide_rows, begin + layout.chunk_rows);
  return {begin, end, chunk + 1 == layout.chunks ? layout.tail : 0};
}

// A second pass begins with the last chunk, which is still in the core's cache from the first pass, and ends at the
// beginning of its output, where the next operation starts to read. Each thread does so with the chunks it is given.
enum Order { kFirstFirst, kLastFirst };

void ForEachChunk(tf::OpKernelContext* context, const Layout& layout, const std::function<void(int64_t)>& work,
                  Order order = kFirstFirst) {
  // About a cycle for each number: what decides how many chunks a thread is given at a time.
  const int64_t cycles = layout.chunk_rows * layout.width;
  context->device()->tensorflow_cpu_worker_threads()->workers->ParallelFor(
      layout.chunks, cycles, [&work, order](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) work(order == kFirstFirst ? i : begin + end - 1 - i);
      });
}

// Two sums for each channel, over chunks that may be worked on in any order.
class Sums {
 public:
  explicit Sums(const Layout& layout) : layout_(layout), of_chunks_(2 * layout.chunks * layout.channels) {}

  // `wide` are the two sums of the chunk, for each number of a wide row.
  void Put(int64_t chunk, const std::vector<float>& wide) {
    double* sums = &of_chunks_[2 * chunk * layout_.channels];
    for (int64_t which = 0; which < 2; ++which, sums += layout_.channels) {
      const float* numbers = &wide[which * layout_.width];
      for (int64_t repeat = 0; repeat < layout_.repeats; ++repeat, numbers += layout_.channels) {
        for (int64_t c = 0; c < layout_.channels; ++c) sums[c] += static_cast<double>(numbers[c]);
      }
    }
  }

  // The first sums of all channels, then the second ones.
  std::vector<double> Total() const {
    const int64_t count = 2 * layout_.channels;
    std::vector<double> total(count);
    for (int64_t chunk = 0; chunk < layout_.chunks; ++chunk) {
      for (int64_t i = 0; i < count; ++i) total[i] += of_chunks_[chunk * count + i];
    }
    return total;
  }

 private:
  const Layout& layout_;
  std::vector<double> of_chunks_;
};

// ---------------------------------------------------------------- forward

template <typename T>
struct Forward {
  const T* x;
  const T* residual;  // null if there is none
  T* y;
  bool relu;
  std::vector<float> mean, scale, beta;  // for each number of a wide row
};

// Adds x - shift and its square to the sums of each column.
template <typename T, int kRows>
INLINE void AddMoments(const T* x, int64_t width, int64_t count, const float* shift, float* sums, float* squares) {
  VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0.0f, square = 0.0f;
    for (int row = 0; row < kRows; ++row) {
      const float d = Load(x[row * width + i]) - shift[i];
      sum = row == 0 ? d : sum + d;
      square = row == 0 ? d * d : square + d * d;
    }
    sums[i] += sum;
    squares[i] += square;
  }
}

template <typename T>
INLINE void MomentsBody(const T* x, const Range& range, int64_t width, const float* shift, float* sums) {
  int64_t row = range.begin;
  for (; row + 4 <= range.end; row += 4) AddMoments<T, 4>(x + row * width, width, width, shift, sums, sums + width);
  for (; row < range.end; ++row) AddMoments<T, 1>(x + row * width, width, width, shift, sums, sums + width);
  AddMoments<T, 1>(x + row * width, width, range.tail, shift, sums, sums + width);
}

FOR_EACH_CPU(Moments, (const float* x, const Range& range, int64_t width, const float* shift, float* sums), x, range,
             width, shift, sums)
FOR_EACH_CPU(Moments, (const BFloat16* x, const Range& range, int64_t width, const float* shift, float* sums), x, range,
             width, shift, sums)

INLINE float Normalized(float x, float mean, float scale, float beta) { return (x - mean) * scale + beta; }

template <typename T, bool kResidual, bool kRelu>
INLINE void NormalizeRow(const Forward<T>& f, int64_t start, int64_t count) {
  const T* x = f.x + start;
  const T* residual = kResidual ? f.residual + start : nullptr;
  T* y = f.y + start;
  const float *mean = f.mean.data(), *scale = f.scale.data(), *beta = f.beta.data();
  VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    float value = Normalized(Load(x[i]), mean[i], scale[i], beta[i]);
    if (kResidual) value += Load(residual[i]);
    if (kRelu) value = value < 0.0f ? 0.0f : value;  // NaN stays NaN
    Store(value, y + i);
  }
}

template <typename T, bool kResidual, bool kRelu>
INLINE void NormalizeRows(const Forward<T>& f, const Range& range, int64_t width) {
  for (int64_t row = range.begin; row < range.end; ++row) NormalizeRow<T, kResidual, kRelu>(f, row * width, width);
  NormalizeRow<T, kResidual, kRelu>(f, range.end * width, range.tail);
}

template <typename T>
INLINE void NormalizeBody(const Forward<T>& f, const Range& range, int64_t width) {
  if (f.residual != nullptr) return NormalizeRows<T, true, true>(f, range, width);
  if (f.relu) return NormalizeRows<T, false, true>(f, range, width);
  NormalizeRows<T, false, false>(f, range, width);
}

FOR_EACH_CPU(Normalize, (const Forward<float>& f, const Range& range, int64_t width), f, range, width)
FOR_EACH_CPU(Normalize, (const Forward<BFloat16>& f, const Range& range, int64_t width), f, range, width)

// The mean of a few rows: near enough to the mean of all that sums of squares around it lose no digits.
template <typename T>
std::vector<float> NearMean(const T* x, const Layout& layout) {
  const int64_t samples = std::min<int64_t>(16, layout.rows);
  std::vector<float> mean(layout.channels);
  for (int64_t sample = 0; sample < samples; ++sample) {
    const T* row = x + sample * layout.rows / samples * layout.channels;
    for (int64_t c = 0; c < layout.channels; ++c) mean[c] += Load(row[c]) / static_cast<float>(samples);
  }
  return mean;
}

// ---------------------------------------------------------------- backward

enum class Mask { kNone, kFromX, kFromY };

template <typename T>
struct Backward {
  const T* dy[2];  // the second is null if there is one only
  const T* x;
  const T* y;  // null where there is no residual
  T* dresidual;
  T* dx;
  bool relu;
  std::vector<float> mean, scale, beta;          // for each number of a wide row
  std::vector<float> mean_gradient, correction;  // likewise: dbeta / m and dgamma * rstd / m
};

template <typename T, bool kTwo, Mask kMask>
INLINE float Gradient(const T* dy, const T* other_dy, const T* y, float x, float mean, float scale, float beta) {
  float g = Load(*dy);
  if (kTwo) g += Load(*other_dy);
  if (kMask == Mask::kFromX) g = Normalized(x, mean, scale, beta) > 0.0f ? g : 0.0f;
  if (kMask == Mask::kFromY) g = Load(*y) > 0.0f ? g : 0.0f;
  return g;
}

// Adds g and g * (x - mean) to the sums of each column, and writes g if the mask was read from y.
template <typename T, bool kTwo, Mask kMask, int kRows>
INLINE void AddGradients(const Backward<T>& b, int64_t start, int64_t width, int64_t count, float* sums) {
  const T *dy = b.dy[0] + start, *other_dy = kTwo ? b.dy[1] + start : dy, *x = b.x + start;
  const T* y = kMask == Mask::kFromY ? b.y + start : x;
  T* dresidual = kMask == Mask::kFromY ? b.dresidual + start : nullptr;
  const float *mean = b.mean.data(), *scale = b.scale.data(), *beta = b.beta.data();
  float* products = sums + width;
  VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0.0f, product = 0.0f;
    for (int row = 0; row < kRows; ++row) {
      const int64_t at = row * width + i;
      const float value = Load(x[at]);
      const float g = Gradient<T, kTwo, kMask>(dy + at, other_dy + at, y + at, value, mean[i], scale[i], beta[i]);
      if (kMask == Mask::kFromY) Store(g, dresidual + at);
      const float p = g * (value - mean[i]);
      sum = row == 0 ? g : sum + g;
      product = row == 0 ? p : product + p;
    }
    sums[i] += sum;
    products[i] += product;
  }
}

template <typename T, bool kTwo, Mask kMask>
INLINE void SumGradientRows(const Backward<T>& b, const Range& range, int64_t width, float* sums) {
  int64_t row = range.begin;
  for (; row + 2 <= range.end; row += 2) AddGradients<T, kTwo, kMask, 2>(b, row * width, width, width, sums);
  for (; row < range.end; ++row) AddGradients<T, kTwo, kMask, 1>(b, row * width, width, width, sums);
  AddGradients<T, kTwo, kMask, 1>(b, row * width, width, range.tail, sums);
}

template <typename T, bool kTwo, Mask kMask>
INLINE void InputGradientRow(const Backward<T>& b, const T* dy, const T* other_dy, int64_t start, int64_t count) {
  const T* x = b.x + start;
  T* dx = b.dx + start;
  const float *mean = b.mean.data(), *scale = b.scale.data(), *beta = b.beta.data();
  const float *mean_gradient = b.mean_gradient.data(), *correction = b.correction.data();
  VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    const float value = Load(x[i]);
    const float g = Gradient<T, kTwo, kMask>(dy + i, other_dy + i, dy, value, mean[i], scale[i], beta[i]);
    Store(scale[i] * ((g - mean_gradient[i]) - (value - mean[i]) * correction[i]), dx + i);
  }
}

template <typename T, bool kTwo, Mask kMask>
INLINE void InputGradientRows(const Backward<T>& b, const T* dy, const Range& range, int64_t width) {
  const T* other_dy = kTwo ? b.dy[1] : dy;
  for (int64_t row = range.begin; row <= range.end; ++row) {
    const int64_t start = row * width, count = row < range.end ? width : range.tail;
    InputGradientRow<T, kTwo, kMask>(b, dy + start, other_dy + start, start, count);
  }
}

template <typename T>
INLINE void SumGradientsBody(const Backward<T>& b, const Range& range, int64_t width, float* sums) {
  const bool two = b.dy[1] != nullptr;
  if (b.y != nullptr) {
    return two ? SumGradientRows<T, true, Mask::kFromY>(b, range, width, sums)
               : SumGradientRows<T, false, Mask::kFromY>(b, range, width, sums);
  }
  if (b.relu) {
    return two ? SumGradientRows<T, true, Mask::kFromX>(b, range, width, sums)
               : SumGradientRows<T, false, Mask::kFromX>(b, range, width, sums);
  }
  two ? SumGradientRows<T, true, Mask::kNone>(b, range, width, sums)
      : SumGradientRows<T, false, Mask::kNone>(b, range, width, sums);
}

template <typename T>
INLINE void InputGradientBody(const Backward<T>& b, const Range& range, int64_t width) {
  const bool two = b.dy[1] != nullptr;
  if (b.dresidual != nullptr) return InputGradientRows<T, false, Mask::kNone>(b, b.dresidual, range, width);
  if (b.relu) {
    return two ? InputGradientRows<T, true, Mask::kFromX>(b, b.dy[0], range, width)
               : InputGradientRows<T, false, Mask::kFromX>(b, b.dy[0], range, width);
  }
  two ? InputGradientRows<T, true, Mask::kNone>(b, b.dy[0], range, width)
      : InputGradientRows<T, false, Mask::kNone>(b, b.dy[0], range, width);
}

FOR_EACH_CPU(SumGradients, (const Backward<float>& b, const Range& range, int64_t width, float* sums), b, range,
             width, sums)
FOR_EACH_CPU(SumGradients, (const Backward<BFloat16>& b, const Range& range, int64_t width, float* sums), b, range,
             width, sums)
FOR_EACH_CPU(InputGradient, (const Backward<float>& b, const Range& range, int64_t width), b, range, width)
FOR_EACH_CPU(InputGradient, (const Backward<BFloat16>& b, const Range& range, int64_t width), b, range, width)

// ---------------------------------------------------------------- kernels

template <typename T>
const T* Data(const tf::Tensor& tensor) {
  return static_cast<const T*>(tensor.data());
}

template <typename T>
T* Data(tf::Tensor* tensor) {
  return static_cast<T*>(tensor->data());
}

std::vector<float> Products(const float* a, const float* b, int64_t count) {
  std::vector<float> products(count);
  for (int64_t i = 0; i < count; ++i) products[i] = a[i] * b[i];
  return products;
}

// Checks that x is [..., channels] with rows, and that all inputs from `first` to before `last` are [channels].
absl::Status CheckShapes(tf::OpKernelContext* context, const tf::Tensor& x, int first, int last) {
  if (x.dims() < 2 || x.NumElements() == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected activations [..., channels], not ", x.shape().DebugString()));
  }
  const tf::TensorShape channels({x.dim_size(x.dims() - 1)});
  for (int i = first; i < last; ++i) {
    if (context->input(i).shape() != channels) {
      return absl::InvalidArgumentError(absl::StrCat("expected ", channels.DebugString(), " for the channels of ",
                                                     x.shape().DebugString(), ", not ",
                                                     context->input(i).shape().DebugString()));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckLike(const tf::Tensor& x, const tf::Tensor& tensor) {
  if (tensor.shape() == x.shape()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("expected the shape of x, ", x.shape().DebugString(), ", not ",
                                                 tensor.shape().DebugString()));
}

Layout LayoutOf(const tf::Tensor& x) {
  const int64_t channels = x.dim_size(x.dims() - 1);
  return Layout(x.NumElements() / channels, channels);
}

template <typename T>
class BatchNorm : public tf::OpKernel {
 public:
  explicit BatchNorm(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
    OP_REQUIRES_OK(context, context->GetAttr("residuals", &residuals_));
    OP_REQUIRES_OK(context, context->GetAttr("copies", &copies_));
    OP_REQUIRES(context, residuals_ == 0 || (residuals_ == 1 && relu_),
                absl::InvalidArgumentError("expected at most one residual, and ReLU after it"));
  }

  void Compute(tf::OpKernelContext* context) override {
    const tf::Tensor& x = context->input(0);
    OP_REQUIRES_OK(context, CheckShapes(context, x, 1, 3));
    if (residuals_ == 1) OP_REQUIRES_OK(context, CheckLike(x, context->input(kResidual)));
    const Layout layout = LayoutOf(x);

    Forward<T> forward;
    forward.x = Data<T>(x);
    forward.residual = residuals_ == 1 ? Data<T>(context->input(kResidual)) : nullptr;
    forward.relu = relu_;
    tf::Tensor *y, *mean, *variance, *rstd;
    if (residuals_ == 1) {
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({kResidual}, 0, x.shape(), &y));
    } else {
      OP_REQUIRES_OK(context, context->allocate_output(0, x.shape(), &y));
    }
    for (int copy = 1; copy < copies_; ++copy) context->set_output(copy, *y);
    const tf::TensorShape channels({layout.channels});
    OP_REQUIRES_OK(context, context->allocate_output(copies_, channels, &mean));
    OP_REQUIRES_OK(context, context->allocate_output(copies_ + 1, channels, &variance));
    OP_REQUIRES_OK(context, context->allocate_output(copies_ + 2, channels, &rstd));
    forward.y = Data<T>(y);

    Statistics(context, layout, forward.x, Data<float>(mean), Data<float>(variance), Data<float>(rstd));
    forward.mean = layout.Widen(Data<float>(mean));
    forward.scale = layout.Widen(Products(Data<float>(context->input(1)), Data<float>(rstd), layout.channels).data());
    forward.beta = layout.Widen(Data<float>(context->input(2)));
    ForEachChunk(
        context, layout, [&](int64_t chunk) { Normalize(forward, RangeOf(layout, chunk), layout.width); }, kLastFirst);
  }

 private:
  void Statistics(tf::OpKernelContext* context, const Layout& layout, const T* x, float* mean, float* variance,
                  float* rstd) const {
    const std::vector<float> near_mean = NearMean(x, layout), shift = layout.Widen(near_mean.data());
    Sums sums(layout);
    ForEachChunk(context, layout, [&](int64_t chunk) {
      std::vector<float> wide(2 * layout.width);
      Moments(x, RangeOf(layout, chunk), layout.width, shift.data(), wide.data());
      sums.Put(chunk, wide);
    });
    const std::vector<double> total = sums.Total();
    const double count = static_cast<double>(layout.rows);
    for (int64_t c = 0; c < layout.channels; ++c) {
      const double from_shift = total[c] / count;
      const double biased = total[layout.channels + c] / count - from_shift * from_shift;
      const double deviation = biased < 0.0 ? 0.0 : biased;  // NaN stays NaN
      mean[c] = static_cast<float>(static_cast<double>(near_mean[c]) + from_shift);
      variance[c] = static_cast<float>(deviation * count / std::max(1.0, count - 1.0));
      rstd[c] = static_cast<float>(1.0 / std::sqrt(deviation + static_cast<double>(epsilon_)));
    }
  }

  static constexpr int kResidual = 3;
  float epsilon_;
  bool relu_;
  int residuals_, copies_;
};

template <typename T>
class BatchNormGrad : public tf::OpKernel {
 public:
  explicit BatchNormGrad(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
    OP_REQUIRES_OK(context, context->GetAttr("residuals", &residuals_));
    OP_REQUIRES_OK(context, context->GetAttr("copies", &copies_));
    OP_REQUIRES(context, residuals_ <= 1 && copies_ <= 2,
                absl::InvalidArgumentError("expected at most one residual and two gradients"));
  }

  void Compute(tf::OpKernelContext* context) override {
    const int x_index = copies_, y_index = copies_ + 5;
    const tf::Tensor& x = context->input(x_index);
    OP_REQUIRES_OK(context, CheckShapes(context, x, x_index + 1, x_index + 5));
    for (int copy = 0; copy < copies_; ++copy) OP_REQUIRES_OK(context, CheckLike(x, context->input(copy)));
    if (residuals_ == 1) OP_REQUIRES_OK(context, CheckLike(x, context->input(y_index)));
    const Layout layout = LayoutOf(x);
    const float* rstd = Data<float>(context->input(x_index + 4));

    Backward<T> backward;
    backward.dy[0] = Data<T>(context->input(0));
    backward.dy[1] = copies_ == 2 ? Data<T>(context->input(1)) : nullptr;
    backward.x = Data<T>(x);
    backward.y = residuals_ == 1 ? Data<T>(context->input(y_index)) : nullptr;
    backward.relu = relu_;
    backward.scale =
        layout.Widen(Products(Data<float>(context->input(x_index + 1)), rstd, layout.channels).data());
    backward.beta = layout.Widen(Data<float>(context->input(x_index + 2)));
    backward.mean = layout.Widen(Data<float>(context->input(x_index + 3)));

    // With a residual the gradients are read for the last time as dresidual is written, and only x as dx is.
    tf::Tensor *dx, *dgamma, *dbeta, *dresidual = nullptr;
    if (residuals_ == 1) {
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0, copies_ - 1}, 3, x.shape(), &dresidual));
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({x_index}, 0, x.shape(), &dx));
    } else {
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0, x_index}, 0, x.shape(), &dx));
    }
    const tf::TensorShape channels({layout.channels});
    OP_REQUIRES_OK(context, context->allocate_output(1, channels, &dgamma));
    OP_REQUIRES_OK(context, context->allocate_output(2, channels, &dbeta));
    backward.dresidual = dresidual == nullptr ? nullptr : Data<T>(dresidual);
    backward.dx = Data<T>(dx);

    Sums sums(layout);
    ForEachChunk(context, layout, [&](int64_t chunk) {
      std::vector<float> wide(2 * layout.width);
      SumGradients(backward, RangeOf(layout, chunk), layout.width, wide.data());
      sums.Put(chunk, wide);
    });
    const std::vector<double> total = sums.Total();
    std::vector<float> mean_gradient(layout.channels), correction(layout.channels);
    const double count = static_cast<double>(layout.rows);
    for (int64_t c = 0; c < layout.channels; ++c) {
      const double of_channel = rstd[c], product = total[layout.channels + c] * of_channel;
      Data<float>(dgamma)[c] = static_cast<float>(product);
      Data<float>(dbeta)[c] = static_cast<float>(total[c]);
      mean_gradient[c] = static_cast<float>(total[c] / count);
      correction[c] = static_cast<float>(product * of_channel / count);
    }
    backward.mean_gradient = layout.Widen(mean_gradient.data());
    backward.correction = layout.Widen(correction.data());
    ForEachChunk(
        context, layout, [&](int64_t chunk) { InputGradient(backward, RangeOf(layout, chunk), layout.width); },
        kLastFirst);
  }

 private:
  bool relu_;
  int residuals_, copies_;
};

// ---------------------------------------------------------------- registration

using tf::shape_inference::InferenceContext;
using tf::shape_inference::ShapeHandle;

// Both operations have outputs like x, then ones of a number per channel, then again ones like x.
absl::Status SetShapes(InferenceContext* context, int x_index, int like_x, int of_channels) {
  ShapeHandle x, channels;
  TF_RETURN_IF_ERROR(context->WithRankAtLeast(context->input(x_index), 2, &x));
  TF_RETURN_IF_ERROR(context->Merge(context->Vector(context->Dim(x, -1)), context->input(x_index + 1), &channels));
  for (int i = 0; i < context->num_outputs(); ++i) {
    context->set_output(i, i >= like_x && i < like_x + of_channels ? channels : x);
  }
  return absl::OkStatus();
}

REGISTER_OP("HpctrainBatchNorm")
    .Input("x: T")
    .Input("gamma: float")
    .Input("beta: float")
    .Input("residual: residuals * T")
    .Output("y: copies * T")
    .Output("mean: float")
    .Output("variance: float")
    .Output("reciprocal_deviation: float")
    .Attr("T: {float, bfloat16}")
    .Attr("residuals: int >= 0")
    .Attr("copies: int >= 1")
    .Attr("epsilon: float")
    .Attr("relu: bool")
    .SetShapeFn([](InferenceContext* context) {
      return SetShapes(context, 0, context->num_outputs() - 3, 3);
    });

REGISTER_OP("HpctrainBatchNormGrad")
    .Input("dy: copies * T")
    .Input("x: T")
    .Input("gamma: float")
    .Input("beta: float")
    .Input("mean: float")
    .Input("reciprocal_deviation: float")
    .Input("y: residuals * T")
    .Output("dx: T")
    .Output("dgamma: float")
    .Output("dbeta: float")
    .Output("dresidual: residuals * T")
    .Attr("T: {float, bfloat16}")
    .Attr("copies: int >= 1")
    .Attr("residuals: int >= 0")
    .Attr("relu: bool")
    .SetShapeFn([](InferenceContext* context) {
      const int residuals = context->num_outputs() - 3;
      return SetShapes(context, context->num_inputs() - 5 - residuals, 1, 2);
    });

#define REGISTER(T, Number)                                                                               \
  REGISTER_KERNEL_BUILDER(Name("HpctrainBatchNorm").Device(tf::DEVICE_CPU).TypeConstraint<T>("T"),        \
                          BatchNorm<Number>);                                                             \
  REGISTER_KERNEL_BUILDER(Name("HpctrainBatchNormGrad").Device(tf::DEVICE_CPU).TypeConstraint<T>("T"),    \
                          BatchNormGrad<Number>);
REGISTER(float, float)
REGISTER(tf::bfloat16, BFloat16)

}  // namespace
