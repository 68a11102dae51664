// TensorFlow operations for ranks that are all on one host and have their weights in common: what each adds up is its
// share of every gradient, from memory in which the others lay out theirs, when it needs the sum.
//
// HpctrainGiveSummands lays out a gradient, and looks whether its numbers are finite on the way.
// HpctrainHostSquares tells the squares of the norms of summed gradients and weights, of which each rank reads a share.
//
// Results are the same on every CPU and for any number of threads (see momentum.cc).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/status/status.h"
#include "each_cpu.h"
#include "host_memory.h"
#include "host_share.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"

namespace {

namespace tf = tensorflow;
using hpctrain::BeginOfShare;
using hpctrain::kBlock;

class GiveSummands : public tf::OpKernel {
 public:
  explicit GiveSummands(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("part", &part_));
    OP_REQUIRES_OK(context, context->GetAttr("parts", &parts_));
    OP_REQUIRES_OK(context, context->GetAttr("offset", &offset_));
    OP_REQUIRES(context, 0 <= part_ && part_ < parts_, absl::InvalidArgumentError("part is to be one of parts"));
  }

  // So that it comes right after what has made the gradient, which then is in the cache.
  bool IsExpensive() override { return false; }

  void Compute(tf::OpKernelContext* context) override {
    const tf::Tensor& gradient = context->input(1);
    const int64_t count = gradient.NumElements();
    hpctrain::Summands summands;
    OP_REQUIRES_OK(context, summands.Find(context, 0, parts_));
    float* to = summands.Of<float>(part_, offset_, count);
    OP_REQUIRES(context, to != nullptr, absl::InvalidArgumentError("there is no room for the gradient"));
    const float* from = gradient.flat<float>().data();
    const int64_t own = BeginOfShare(count, part_, parts_), own_end = BeginOfShare(count, part_ + 1, parts_);
    std::atomic<bool> finite{true};
    const auto& threads = *context->device()->tensorflow_cpu_worker_threads();
    tf::Shard(threads.num_threads, threads.workers, count, kCycles, [&](int64_t at, int64_t end) {
      while (at < end) {
        const bool is_own = own <= at && at < own_end;
        const int64_t turn = at < own ? own : is_own ? own_end : end;  // where that is otherwise
        const int64_t n = std::min({kBlock, turn - at, end - at});
        if (!is_own) std::memcpy(to + at, from + at, n * sizeof(float));
        if (!hpctrain::AllFinite(from + at, n)) finite = false;
        at += n;
      }
    });
    tf::Tensor* told;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &told));
    told->scalar<bool>()() = finite;
  }

 private:
  static constexpr int64_t kCycles = 2;  // a number takes
  int part_, parts_;
  int64_t offset_;
};

REGISTER_OP("HpctrainGiveSummands")
    .Input("summands: resource")
    .Input("gradient: float")
    .Output("finite: bool")
    .Attr("offset: int")
    .Attr("part: int")
    .Attr("parts: int")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::ScalarShape);

REGISTER_KERNEL_BUILDER(Name("HpctrainGiveSummands").Device(tf::DEVICE_CPU), GiveSummands);

struct Squares {
  double gradient = 0, weight = 0, product = 0;
};

// Of at most kBlock numbers. Lanes are written out, as a compiler may not add in another order than is written.
FOR_EACH_CPU Squares SquaresOf(const float* __restrict__ gradient, const float* __restrict__ weight, int64_t count) {
  constexpr int kLanes = 16;
  float gradients[kLanes] = {}, weights[kLanes] = {}, products[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float g = gradient[i + lane], w = weight[i + lane];
      gradients[lane] += g * g;
      weights[lane] += w * w;
      products[lane] += g * w;
    }
  }
  Squares squares;
  for (int lane = 0; lane < kLanes; ++lane) {
    squares.gradient += gradients[lane];
    squares.weight += weights[lane];
    squares.product += products[lane];
  }
  for (; i < count; ++i) {
    const double g = gradient[i], w = weight[i];
    squares.gradient += g * g;
    squares.weight += w * w;
    squares.product += g * w;
  }
  return squares;
}

class HostSquares : public tf::OpKernel {
 public:
  explicit HostSquares(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("part", &part_));
    OP_REQUIRES_OK(context, context->GetAttr("parts", &parts_));
    OP_REQUIRES_OK(context, context->GetAttr("offsets", &offsets_));
    OP_REQUIRES(context, 0 <= part_ && part_ < parts_, absl::InvalidArgumentError("part is to be one of parts"));
  }

  void Compute(tf::OpKernelContext* context) override {
    const int number = (context->num_inputs() - 2) / 2;
    OP_REQUIRES(context, int(offsets_.size()) == number, absl::InvalidArgumentError("each gradient is to have an offset"));
    tf::core::RefCountPtr<tf::Var> memory;
    hpctrain::Header* header;
    OP_REQUIRES_OK(context, hpctrain::FindHeader(context, 0, &memory, &header));
    hpctrain::Summands summands;
    OP_REQUIRES_OK(context, summands.Find(context, 1, parts_));
    double* own = summands.Of<double>(part_, 0, 3 * number);
    OP_REQUIRES(context, own != nullptr, absl::InvalidArgumentError("there is no room for squares"));
    const bool apart = header->apart.load() != 0;

    struct Piece {
      int variable;
      int64_t begin, end;
    };
    std::vector<Piece> pieces;
    for (int i = 0; i < number; ++i) {
      const tf::Tensor &gradient = context->input(2 + i), &weight = context->input(2 + number + i);
      const int64_t count = gradient.NumElements();
      OP_REQUIRES(context, gradient.shape() == weight.shape() && summands.Of<float>(0, offsets_[i], count) != nullptr,
                  absl::InvalidArgumentError("gradients are to be as large as their weights and to have been given"));
      const int64_t end = apart ? count : BeginOfShare(count, part_ + 1, parts_);
      for (int64_t at = apart ? 0 : BeginOfShare(count, part_, parts_); at < end; at += kPiece) {
        pieces.push_back({i, at, std::min(end, at + kPiece)});
      }
    }
    std::vector<Squares> of_pieces(pieces.size());
    const auto& threads = *context->device()->tensorflow_cpu_worker_threads();
    tf::Shard(threads.num_threads, threads.workers, pieces.size(), kCycles * kPiece, [&](int64_t first, int64_t last) {
      float sum[kBlock];
      for (int64_t p = first; p < last; ++p) {
        const Piece& piece = pieces[p];
        const float* gradient = context->input(2 + piece.variable).flat<float>().data();
        const float* weight = context->input(2 + number + piece.variable).flat<float>().data();
        for (int64_t at = piece.begin; at < piece.end; at += kBlock) {
          const int64_t n = std::min(kBlock, piece.end - at);
          const auto of_rank = [&](int rank) {
            return (rank == part_ ? gradient : summands.Of<float>(rank, offsets_[piece.variable], 0)) + at;
          };
          hpctrain::AddRanks(parts_, of_rank, n, sum, sum);
          const Squares squares = SquaresOf(sum, weight + at, n);
          of_pieces[p].gradient += squares.gradient;
          of_pieces[p].weight += squares.weight;
          of_pieces[p].product += squares.product;
        }
      }
    });
    std::fill(own, own + 3 * number, 0.0);
    for (size_t p = 0; p < pieces.size(); ++p) {
      own[pieces[p].variable] += of_pieces[p].gradient;
      own[number + pieces[p].variable] += of_pieces[p].weight;
      own[2 * number + pieces[p].variable] += of_pieces[p].product;
    }
    header->barrier.Wait(parts_, [] {});
    tf::Tensor* all;
    OP_REQUIRES_OK(context, context->allocate_output(0, {3, number}, &all));
    for (int i = 0; i < 3 * number; ++i) {
      double sum = 0;
      for (int rank = 0; rank < parts_; ++rank) {
        if (!apart || rank == part_) sum += summands.Of<double>(rank, 0, 3 * number)[i];
      }
      all->flat<double>()(i) = sum;
    }
  }

 private:
  static constexpr int64_t kPiece = 16 * kBlock;
  static constexpr int64_t kCycles = 3;  // a number takes
  int part_, parts_;
  std::vector<int64_t> offsets_;
};

REGISTER_OP("HpctrainHostSquares")
    .Input("memory: resource")
    .Input("summands: resource")
    .Input("gradients: number * float")
    .Input("weights: number * float")
    .Output("squares: double")
    .Attr("number: int >= 1")
    .Attr("offsets: list(int)")
    .Attr("part: int")
    .Attr("parts: int")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      c->set_output(0, c->Matrix(3, (c->num_inputs() - 2) / 2));
      return absl::OkStatus();
    });

REGISTER_KERNEL_BUILDER(Name("HpctrainHostSquares").Device(tf::DEVICE_CPU), HostSquares);

}  // namespace
