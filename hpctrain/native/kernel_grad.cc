// TensorFlow operation HpctrainKernelGrad: the gradient of a convolution's kernel from bfloat16 images and gradients, on
// processors with AMX or AVX512_BF16. kernel_grad.h says how.
//
// Results do not depend on the number of threads: each number of the gradient is summed up by one thread, in an order
// that positions alone decide.

#if defined(__x86_64__) && defined(__GNUC__) && __has_include(<amxbf16intrin.h>)  // g++ 11 and newer

#include "kernel_grad_products.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace {

bool HasAvx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

// Whether this CPU has AMX, and Linux lets this process use it.
bool HasAmx() {
  constexpr unsigned kAmxBfloat16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBfloat16) || !(d & kAmxTile)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

// Whether this CPU has the instructions for the operation.
extern "C" bool hpctrain_kernel_grad_works() {
  return HasAvx512() && (__builtin_cpu_supports("avx512bf16") || HasAmx());
}

namespace {

namespace tf = tensorflow;
using namespace hpctrain;

absl::Status Allocate(tf::OpKernelContext* context, int64_t numbers, tf::Tensor* memory) {
  return context->allocate_temp(tf::DT_BFLOAT16, tf::TensorShape({numbers}), memory);
}

Bits* BitsOf(tf::Tensor& tensor) { return reinterpret_cast<Bits*>(tensor.flat<tf::bfloat16>().data()); }
const Bits* BitsOf(const tf::Tensor& tensor) {
  return reinterpret_cast<const Bits*>(tensor.flat<tf::bfloat16>().data());
}

class KernelGrad : public tf::OpKernel {
 public:
  explicit KernelGrad(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("kernel_size", &kernel_size_));
    OP_REQUIRES_OK(context, context->GetAttr("stride", &stride_));
    OP_REQUIRES_OK(context, context->GetAttr("amx", &amx_));
    amx_ = amx_ && HasAmx();
    std::string padding;
    OP_REQUIRES_OK(context, context->GetAttr("padding", &padding));
    same_ = padding == "SAME";
    OP_REQUIRES(context, kernel_size_.size() == 2 && kernel_size_[0] > 0 && kernel_size_[1] > 0 && stride_ > 0,
                absl::InvalidArgumentError("expected two sizes of the kernel and a stride"));
  }

  void Compute(tf::OpKernelContext* context) override {
    const tf::Tensor &x = context->input(0), &dy = context->input(1);
    OP_REQUIRES(context, x.dims() == 4 && dy.dims() == 4 && x.dim_size(0) == dy.dim_size(0),
                absl::InvalidArgumentError(absl::StrCat("expected images and gradients [n, h, w, channels], not ",
                                                        x.shape().DebugString(), " and ", dy.shape().DebugString())));
    Convolution of{x.dim_size(0), x.dim_size(1), x.dim_size(2), x.dim_size(3), 0, 0, x.dim_size(3), dy.dim_size(3),
                   kernel_size_[0], kernel_size_[1], stride_, 0, 0};
    Pad(of.height, of.kernel_height, &of.out_height, &of.top);
    Pad(of.width, of.kernel_width, &of.out_width, &of.left);
    OP_REQUIRES(context, dy.dim_size(1) == of.out_height && dy.dim_size(2) == of.out_width,
                absl::InvalidArgumentError(absl::StrCat("expected gradients of ", of.out_height, " x ", of.out_width,
                                                        " pixels, not ", dy.shape().DebugString())));
    tf::Tensor *dw, padded_x, sums;
    OP_REQUIRES_OK(context, context->allocate_output(0, tf::TensorShape({of.kernel_height, of.kernel_width,
                                                                         of.channels_in, of.channels_out}), &dw));
    float* const result = dw->flat<float>().data();
    if (dy.NumElements() == 0 || dw->NumElements() == 0) {
      std::fill_n(result, dw->NumElements(), 0.0f);
      return;
    }
    const Bits* pixels = BitsOf(x);
    if (of.channels_in < kTile && of.kernel_width > 1) {
      OP_REQUIRES_OK(context, TakeRowsForPixels(context, &of, &pixels, &padded_x));
    }
    if (of.in() == of.channels_in && of.out() == of.channels_out) {
      return Sum(context, of, pixels, BitsOf(dy), result);
    }
    const int64_t rows = of.kernel_height * of.kernel_width;
    OP_REQUIRES_OK(context, context->allocate_temp(tf::DT_FLOAT, tf::TensorShape({rows, of.in(), of.out()}), &sums));
    Sum(context, of, pixels, BitsOf(dy), sums.flat<float>().data());
    for (int64_t row = 0; row < rows * of.channels_in; ++row) {
      const int64_t padded_row = row / of.channels_in * of.in() + row % of.channels_in;
      std::copy_n(sums.flat<float>().data() + padded_row * of.out(), of.channels_out, result + row * of.channels_out);
    }
  }

 private:
  // Sets how many pixels the output has for those of the input, and how many zeros come before them.
  void Pad(int64_t size, int64_t kernel, int64_t* out_size, int64_t* before) const {
    *out_size = same_ ? Parts(size, stride_) : Parts(std::max<int64_t>(0, size - kernel + 1), stride_);
    *before = same_ ? std::max<int64_t>(0, (*out_size - 1) * stride_ + kernel - size) / 2 : 0;
  }

  // Images of few channels would leave most of a tile empty. A row of the kernel is read as one pixel with all its
  // channels; where the kernel goes beyond the images, from a copy with zeros around.
  static absl::Status TakeRowsForPixels(tf::OpKernelContext* context, Convolution* of, const Bits** x, tf::Tensor* copy) {
    const int64_t width = std::max(of->width, (of->out_width - 1) * of->stride + of->kernel_width);
    if (width > of->width) {
      const int64_t rows = of->images * of->height, row = of->width * of->pixel, padded_row = width * of->pixel;
      TF_RETURN_IF_ERROR(Allocate(context, rows * padded_row, copy));
      std::fill_n(BitsOf(*copy), copy->NumElements(), Bits{0});
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(*x + i * row, row, BitsOf(*copy) + i * padded_row + of->left * of->pixel);
      }
      *x = BitsOf(*copy);
    }
    of->channels_in *= of->kernel_width;
    of->width = width;
    of->kernel_width = 1;
    of->left = 0;
    return absl::OkStatus();
  }

  // Writes the gradient into sums[kernel_height * kernel_width][in()][out()].
  void Sum(tf::OpKernelContext* context, const Convolution& of, const Bits* x, const Bits* dy, float* sums) const {
    (amx_ ? SumBy<Amx> : SumBy<Avx512>)(context, of, x, dy, sums);
  }

  template <typename Instructions>
  static void SumBy(tf::OpKernelContext* context, const Convolution& of, const Bits* x, const Bits* dy, float* sums) {
    tf::thread::ThreadPool* const threads = context->device()->tensorflow_cpu_worker_threads()->workers;
    const Grid grid(of);
    const int64_t room = Instructions::kRoom * threads->NumThreads() / (of.phases() * of.in() + of.out());
    const int64_t most = std::max({room, 2 * grid.farthest, kFewestPositions});
    const int64_t positions = RoundUp(of.images * grid.image, kPositions);
    const int64_t at_once = RoundUp(Parts(positions, Parts(positions, most)), kInARow);
    const Band largest(grid, 0, std::min(positions, at_once));
    tf::Tensor zeros, turned, paired;
    OP_REQUIRES_OK(context, Allocate(context, std::max(of.channels_in, of.channels_out), &zeros));
    OP_REQUIRES_OK(context, Allocate(context, of.phases() * of.in() * largest.of_x, &turned));
    OP_REQUIRES_OK(context, Allocate(context, of.out() * largest.of_dy, &paired));
    std::fill_n(BitsOf(zeros), zeros.NumElements(), Bits{0});

    for (int64_t begin = 0; begin < positions; begin += at_once) {
      const Band band(grid, begin, std::min(at_once, positions - begin));
      const int64_t blocks_of_x = band.of_x / kPositions, blocks_of_dy = band.of_dy / kPositions;
      const int64_t turns = of.phases() * blocks_of_x;
      ForEach(threads, turns + blocks_of_dy, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          if (block < turns) {
            const int64_t phase = block / blocks_of_x;
            LayOutTurned(of, grid, band, phase, block % blocks_of_x * kPositions, x, BitsOf(zeros),
                         BitsOf(turned) + phase * of.in() * band.of_x);
          } else {
            LayOutPaired(of, grid, band, (block - turns) * kPositions, dy, BitsOf(zeros), BitsOf(paired));
          }
        }
      });
      const int64_t blocks_in = Parts(of.in(), 2 * kTile), blocks_out = Parts(of.out(), 2 * kTile);
      ForEach(threads, blocks_in * blocks_out, [&](int64_t first, int64_t last) {
        [[maybe_unused]] const typename Instructions::Scope scope;
        for (int64_t block = first; block < last; ++block) {
          const int64_t in = block / blocks_out * 2 * kTile, out = block % blocks_out * 2 * kTile;
          MultiplyChannels<Instructions>(of, grid, band, in, out, BitsOf(turned), BitsOf(paired), begin > 0, sums);
        }
      });
    }
  }

  // Calls work(begin, end) for ranges of pieces, several for each thread.
  static void ForEach(tf::thread::ThreadPool* threads, int64_t pieces, const std::function<void(int64_t, int64_t)>& work) {
    if (threads->NumThreads() == 1) return work(0, pieces);
    const int64_t range = Parts(pieces, 4 * threads->NumThreads());
    threads->ParallelFor(pieces,
                         tf::thread::ThreadPool::SchedulingParams(
                             tf::thread::ThreadPool::SchedulingStrategy::kFixedBlockSize, std::nullopt, range),
                         work);
  }

  static constexpr int64_t kFewestPositions = 512;  // fewer are not worth reading and writing the sums
  std::vector<int64_t> kernel_size_;
  int64_t stride_;
  bool same_, amx_;
};

// ---------------------------------------------------------------- registration

using tf::shape_inference::InferenceContext;
using tf::shape_inference::ShapeHandle;

REGISTER_OP("HpctrainKernelGrad")
    .Input("x: bfloat16")
    .Input("dy: bfloat16")
    .Output("dkernel: float")
    .Attr("kernel_size: list(int) = [1, 1]")
    .Attr("stride: int = 1")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("amx: bool = true")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x, dy;
      std::vector<int64_t> size;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 4, &x));
      TF_RETURN_IF_ERROR(context->WithRank(context->input(1), 4, &dy));
      TF_RETURN_IF_ERROR(context->GetAttr("kernel_size", &size));
      if (size.size() != 2) return absl::InvalidArgumentError("expected two sizes of the kernel");
      context->set_output(0, context->MakeShape({size[0], size[1], context->Dim(x, 3), context->Dim(dy, 3)}));
      return absl::OkStatus();
    });

REGISTER_KERNEL_BUILDER(Name("HpctrainKernelGrad").Device(tf::DEVICE_CPU), KernelGrad);

}  // namespace

#else  // other processors have other instructions, and older compilers do not know these

extern "C" bool hpctrain_kernel_grad_works() { return false; }

#endif
