// TensorFlow operations HpctrainWinograd and HpctrainWinogradKernelGrad: 3x3 convolutions of float32 images with stride
// 1 and a border of one zero, and the gradients of their inputs and kernels. winograd.h has the algorithm.
//
// Results do not depend on the number of threads: work is cut by the shape alone, and what is cut is added in order.

#if defined(__x86_64__) && defined(__GNUC__)

#include "winograd.h"

#include <algorithm>
#include <functional>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

// Whether this CPU has the instructions for the operations.
extern "C" bool hpctrain_winograd_works() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f");
}

namespace {

namespace tf = tensorflow;
using namespace hpctrain;

int64_t RoundUp(int64_t number, int64_t to) { return (number + to - 1) / to * to; }

int64_t Parts(int64_t number, int64_t of) { return (number + of - 1) / of; }

// Range number `index` of those that cut `size` into pieces of `of`.
Range Piece(int64_t index, int64_t of, int64_t size) { return {index * of, std::min(size, (index + 1) * of)}; }

tf::thread::ThreadPool* Threads(tf::OpKernelContext* context) {
  return context->device()->tensorflow_cpu_worker_threads()->workers;
}

absl::Status Allocate(tf::OpKernelContext* context, int64_t numbers, tf::Tensor* memory) {
  return context->allocate_temp(tf::DT_FLOAT, tf::TensorShape({numbers}), memory);
}

float* Numbers(tf::Tensor& tensor) { return tensor.flat<float>().data(); }
const float* Numbers(const tf::Tensor& tensor) { return tensor.flat<float>().data(); }

// Calls work(piece, scratch) for all pieces, where scratch is room for so many numbers that no other thread uses.
absl::Status ForEach(tf::OpKernelContext* context, int64_t pieces, int64_t room,
                     const std::function<void(int64_t, float*)>& work) {
  tf::Tensor scratch;
  TF_RETURN_IF_ERROR(Allocate(context, (Threads(context)->NumThreads() + 1) * room, &scratch));
  const tf::thread::ThreadPool::SchedulingParams one_by_one(
      tf::thread::ThreadPool::SchedulingStrategy::kFixedBlockSize, std::nullopt, 1);
  Threads(context)->ParallelFor(pieces, one_by_one, [&](int64_t begin, int64_t end) {
    const int64_t thread = Threads(context)->CurrentThreadId() + 1;  // 0 is the one that has called
    for (int64_t piece = begin; piece < end; ++piece) work(piece, Numbers(scratch) + thread * room);
  });
  return absl::OkStatus();
}

absl::Status Zeros(tf::OpKernelContext* context, int64_t numbers, tf::Tensor* memory) {
  TF_RETURN_IF_ERROR(Allocate(context, numbers, memory));
  std::fill_n(Numbers(*memory), numbers, 0.0f);
  return absl::OkStatus();
}

absl::Status CheckChannels(int64_t in, int64_t out) {
  if (in > 0 && out > 0 && in % kVector == 0 && out % kVector == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("expected multiples of ", kVector, " channels, not ", in, " and ", out));
}

// The convolution of images [n, h, w, in] with kernels [3, 3, in, out]; or, `turned`, the gradient of its input: of
// [n, h, w, out] with the same kernels.
class Winograd : public tf::OpKernel {
 public:
  explicit Winograd(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("turned", &turned_));
  }

  void Compute(tf::OpKernelContext* context) override {
    const tf::Tensor &x = context->input(0), &kernel = context->input(1);
    OP_REQUIRES(context,
                x.dims() == 4 && kernel.dims() == 4 && kernel.dim_size(0) == 3 && kernel.dim_size(1) == 3 &&
                    kernel.dim_size(turned_ ? 3 : 2) == x.dim_size(3),
                absl::InvalidArgumentError(absl::StrCat("expected images [n, h, w, channels] and a kernel [3, 3, in, ",
                                                        "out], not ", x.shape().DebugString(), " and ",
                                                        kernel.shape().DebugString())));
    const Shape shape{x.dim_size(0), x.dim_size(1), x.dim_size(2), kernel.dim_size(2), kernel.dim_size(3)};
    OP_REQUIRES_OK(context, CheckChannels(shape.in, shape.out));
    const int64_t from = turned_ ? shape.out : shape.in, to = turned_ ? shape.in : shape.out;
    tf::Tensor *y, zeros;
    OP_REQUIRES_OK(context,
                   context->allocate_output(0, tf::TensorShape({shape.images, shape.height, shape.width, to}), &y));
    if (y->NumElements() == 0) return;
    OP_REQUIRES_OK(context, Zeros(context, from, &zeros));
    const Problem problem{shape, from, to, Numbers(x), Numbers(kernel), Numbers(zeros), Numbers(*y)};
    OP_REQUIRES_OK(context, shape.tiles() < to ? TilesFirst(context, problem) : KernelFirst(context, problem));
  }

 private:
  struct Problem {
    Shape shape;
    int64_t from, to;  // channels of x and y
    const float *x, *kernel, *zeros;
    float* y;
  };

  // Transforms all tiles, which have fewer numbers than the kernel, and then that, a panel of columns at a time.
  absl::Status TilesFirst(tf::OpKernelContext* context, const Problem& of) const {
    const int64_t tiles = of.shape.tiles(), room = ConvolvePanelRoom(tiles);
    tf::Tensor transformed;
    TF_RETURN_IF_ERROR(Allocate(context, Matrices::Room(tiles * of.from), &transformed));
    const Matrices inputs(Numbers(transformed), tiles * of.from);
    TF_RETURN_IF_ERROR(ForEach(context, Parts(tiles, kTilesAtOnce), 0, [&](int64_t piece, float*) {
      const Range range = Piece(piece, kTilesAtOnce, tiles);
      TransformTiles<OfInput, 1>(of.shape, of.x, of.from, {0, of.from}, range, of.from, of.zeros,
                                 inputs.From(range.begin * of.from));
    }));
    return ForEach(context, Parts(of.to, kPanel), room, [&](int64_t piece, float* scratch) {
      ConvolvePanel(of.shape, inputs, of.from, of.kernel, turned_, Piece(piece, kPanel, of.to), scratch, of.y, of.to);
    });
  }

  // Transforms the kernel, and then some tiles at a time.
  absl::Status KernelFirst(tf::OpKernelContext* context, const Problem& of) const {
    const int64_t columns = std::max(kPanel, RoundUp(kFewestWeights / of.from, kPanel));
    const int64_t tiles = of.shape.tiles(), at_once = TilesAtOnce(of.shape, Threads(context)->NumThreads());
    tf::Tensor transformed;
    TF_RETURN_IF_ERROR(Allocate(context, Matrices::Room(of.from * of.to), &transformed));
    const Matrices kernels(Numbers(transformed), of.from * of.to);
    TF_RETURN_IF_ERROR(ForEach(context, Parts(of.to, columns), 0, [&](int64_t piece, float*) {
      const Range range = Piece(piece, columns, of.to);
      TransformKernel(of.kernel, of.shape, turned_, {{0, of.from}, range}, kernels.From(range.begin * of.from));
    }));
    const int64_t room = ConvolveTilesRoom(at_once, of.from, of.to);
    return ForEach(context, Parts(tiles, at_once), room, [&](int64_t piece, float* scratch) {
      ConvolveTiles(of.shape, of.x, of.from, kernels, Piece(piece, at_once, tiles), of.zeros, scratch, of.y, of.to);
    });
  }

  // Every piece of tiles reads the whole kernel: as many tiles as take the memory that the kernel does, but several
  // pieces for each thread. Of how many does not change the results.
  static int64_t TilesAtOnce(const Shape& shape, int64_t threads) {
    const int64_t like_the_kernel = shape.in * shape.out / (shape.in + shape.out);
    const int64_t most = std::clamp<int64_t>(like_the_kernel, 28, 128);
    const int64_t pieces = RoundUp(Parts(shape.tiles(), most), threads == 1 ? 1 : 2 * threads);
    return Parts(shape.tiles(), pieces);
  }

  static constexpr int64_t kTilesAtOnce = 8;        // that are transformed by a thread
  static constexpr int64_t kFewestWeights = 16384;  // times 9; fewer are transformed before another thread is awake
  bool turned_;
};

// The gradient of the kernels from the images and the gradient of the convolution.
class WinogradKernelGrad : public tf::OpKernel {
 public:
  using tf::OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* context) override {
    const tf::Tensor &x = context->input(0), &dy = context->input(1);
    bool alike = x.dims() == 4 && dy.dims() == 4;
    for (int i = 0; i < 3 && alike; ++i) alike = x.dim_size(i) == dy.dim_size(i);
    OP_REQUIRES(context, alike,
                absl::InvalidArgumentError(absl::StrCat("expected images and gradients [n, h, w, channels], not ",
                                                        x.shape().DebugString(), " and ", dy.shape().DebugString())));
    const Shape shape{x.dim_size(0), x.dim_size(1), x.dim_size(2), x.dim_size(3), dy.dim_size(3)};
    OP_REQUIRES_OK(context, CheckChannels(shape.in, shape.out));
    tf::Tensor *dw, zeros;
    OP_REQUIRES_OK(context, context->allocate_output(0, tf::TensorShape({3, 3, shape.in, shape.out}), &dw));
    if (x.NumElements() == 0) {
      std::fill_n(Numbers(*dw), dw->NumElements(), 0.0f);
      return;
    }

    OP_REQUIRES_OK(context, Zeros(context, std::max(shape.in, shape.out), &zeros));
    if (shape.in <= kRows && shape.out <= kRows) {
      OP_REQUIRES_OK(context, OfFewChannels(context, shape, Numbers(x), Numbers(dy), Numbers(zeros), Numbers(*dw)));
    } else {
      OP_REQUIRES_OK(context, OfManyChannels(context, shape, Numbers(x), Numbers(dy), Numbers(zeros), Numbers(*dw)));
    }
  }

 private:
  // The sums of all channels stay in the cache: each thread takes some tiles, a few at a time.
  static absl::Status OfFewChannels(tf::OpKernelContext* context, const Shape& shape, const float* x, const float* dy,
                                    const float* zeros, float* dw) {
    const int64_t tiles = std::max(kFewestTiles, Parts(shape.tiles(), kChunks));  // of a chunk
    const int64_t chunks = Parts(shape.tiles(), tiles), at_once = std::min(shape.tiles(), kTilesAtOnce);
    const int64_t size = 9 * shape.in * shape.out, room = GradientOfTilesRoom(at_once, shape.in, shape.out);
    tf::Tensor others;
    TF_RETURN_IF_ERROR(Allocate(context, (chunks - 1) * size, &others));
    TF_RETURN_IF_ERROR(ForEach(context, chunks, room, [&](int64_t chunk, float* scratch) {
      float* const to = chunk == 0 ? dw : Numbers(others) + (chunk - 1) * size;
      GradientOfTiles(shape, x, dy, Piece(chunk, tiles, shape.tiles()), at_once, zeros, scratch, to);
    }));
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const float* from = Numbers(others) + (chunk - 1) * size;
      for (int64_t i = 0; i < size; ++i) dw[i] += from[i];
    }
    return absl::OkStatus();
  }

  // Tiles are transformed in advance, as many as still stay in the cache, and then each thread sums up some channels.
  static absl::Status OfManyChannels(tf::OpKernelContext* context, const Shape& shape, const float* x, const float* dy,
                                     const float* zeros, float* dw) {
    const int64_t most = std::max(kFewestTiles, kNumbersInAdvance / (kPositions * (shape.in + shape.out)));
    const int64_t at_once = Parts(shape.tiles(), Parts(shape.tiles(), most));
    const int64_t of_inputs = Matrices::Room(at_once * shape.in), of_gradients = Matrices::Room(at_once * shape.out);
    tf::Tensor transformed;
    TF_RETURN_IF_ERROR(Allocate(context, of_inputs + of_gradients, &transformed));
    const int64_t parts_in = Parts(shape.in, kRows), parts_out = Parts(shape.out, kPanel);
    for (int64_t begin = 0; begin < shape.tiles(); begin += at_once) {
      const Range tiles{begin, std::min(shape.tiles(), begin + at_once)};
      const Matrices inputs(Numbers(transformed), tiles.size() * shape.in);
      const Matrices gradients(Numbers(transformed) + of_inputs, tiles.size() * shape.out);
      TF_RETURN_IF_ERROR(ForEach(context, parts_in + parts_out, 0, [&](int64_t piece, float*) {
        if (piece < parts_in) {
          const Range channels = Piece(piece, kRows, shape.in);
          TransformTiles<OfInput, 1>(shape, x, shape.in, channels, tiles, kRows, zeros,
                                     inputs.From(channels.begin * tiles.size()));
        } else {
          const Range channels = Piece(piece - parts_in, kPanel, shape.out);
          TransformTiles<OfGradient, 0>(shape, dy, shape.out, channels, tiles, kPanel, zeros,
                                        gradients.From(channels.begin * tiles.size()));
        }
      }));
      const int64_t room = Matrices::Room(kRows * kPanel);
      TF_RETURN_IF_ERROR(ForEach(context, parts_in * parts_out, room, [&](int64_t piece, float* scratch) {
        const KernelPart part{Piece(piece / parts_out, kRows, shape.in), Piece(piece % parts_out, kPanel, shape.out)};
        GradientOfPart(shape, inputs.From(part.rows.begin * tiles.size()), gradients.From(part.columns.begin * tiles.size()),
                       tiles.size(), part, begin > 0, scratch, dw);
      }));
    }
    return absl::OkStatus();
  }

  static constexpr int64_t kRows = 64;         // of the gradient, of channels of x, that a thread sums up together
  static constexpr int64_t kTilesAtOnce = 42;  // the numbers of which are transformed, then multiplied
  static constexpr int64_t kChunks = 16;       // of tiles, at most
  static constexpr int64_t kFewestTiles = 128;
  static constexpr int64_t kNumbersInAdvance = 1 << 22;
};

// ---------------------------------------------------------------- registration

using tf::shape_inference::InferenceContext;
using tf::shape_inference::ShapeHandle;

REGISTER_OP("HpctrainWinograd")
    .Input("x: float")
    .Input("kernel: float")
    .Output("y: float")
    .Attr("turned: bool = false")
    .SetShapeFn([](InferenceContext* context) {
      bool turned;
      ShapeHandle x, kernel, y;
      TF_RETURN_IF_ERROR(context->GetAttr("turned", &turned));
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 4, &x));
      TF_RETURN_IF_ERROR(context->WithRank(context->input(1), 4, &kernel));
      TF_RETURN_IF_ERROR(context->ReplaceDim(x, 3, context->Dim(kernel, turned ? 2 : 3), &y));
      context->set_output(0, y);
      return absl::OkStatus();
    });

REGISTER_OP("HpctrainWinogradKernelGrad")
    .Input("x: float")
    .Input("dy: float")
    .Output("dkernel: float")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x, dy;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 4, &x));
      TF_RETURN_IF_ERROR(context->WithRank(context->input(1), 4, &dy));
      context->set_output(0, context->MakeShape({3, 3, context->Dim(x, 3), context->Dim(dy, 3)}));
      return absl::OkStatus();
    });

REGISTER_KERNEL_BUILDER(Name("HpctrainWinograd").Device(tf::DEVICE_CPU), Winograd);
REGISTER_KERNEL_BUILDER(Name("HpctrainWinogradKernelGrad").Device(tf::DEVICE_CPU), WinogradKernelGrad);

}  // namespace

#else  // other processors have no AVX-512

extern "C" bool hpctrain_winograd_works() { return false; }

#endif
