// TensorFlow operation HpctrainMomentum: momentum SGD with weight decay in the gradient, in one pass over memory.
//
// `optim/sgd.py` says what it computes. TensorFlow's operations take two passes for it, or a temporary gradient: an
// update does next to no arithmetic, so its time is that of reading and writing.
//
// Where the ranks of a host have their variables in common, each computes its share of every one, where it lies. The gradient
// may then be what this rank has of it, with the others' in memory where they have laid it out (host_summands.cc): it is
// added up here, without a pass of its own.
//
// Results are the same on every CPU and for any number of threads: no fused multiply-add (-ffp-contract=off), and each
// number is computed by the same operations in the same order.

#include <algorithm>
#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "each_cpu.h"
#include "host_memory.h"
#include "host_share.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"

namespace {

namespace tf = tensorflow;

struct Rule {
  float factor, rate, momentum, decay;
  bool nesterov;
};

FOR_EACH_CPU void Update(const Rule rule, const float* __restrict__ gradient, float* __restrict__ weight,
                         float* __restrict__ buffer, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float term = rule.factor * (gradient[i] + rule.decay * weight[i]);
    const float moved = rule.momentum * buffer[i] + term;
    const float step = rule.nesterov ? rule.momentum * moved + term : moved;
    buffer[i] = moved;
    weight[i] -= rule.rate * step;
  }
}

class Momentum : public tf::OpKernel {
 public:
  explicit Momentum(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("momentum", &rule_.momentum));
    OP_REQUIRES_OK(context, context->GetAttr("decay", &rule_.decay));
    OP_REQUIRES_OK(context, context->GetAttr("nesterov", &rule_.nesterov));
    OP_REQUIRES_OK(context, context->GetAttr("part", &part_));
    OP_REQUIRES_OK(context, context->GetAttr("parts", &parts_));
    OP_REQUIRES_OK(context, context->GetAttr("in_common", &memories_));
    OP_REQUIRES_OK(context, context->GetAttr("given", &given_));
    OP_REQUIRES_OK(context, context->GetAttr("summands_offset", &summands_offset_));
    OP_REQUIRES(context, 0 <= part_ && part_ < parts_, absl::InvalidArgumentError("part is to be one of parts"));
  }

  void Compute(tf::OpKernelContext* context) override {
    tf::core::RefCountPtr<tf::Var> variable, buffer;
    OP_REQUIRES_OK(context, tf::LookupResource(context, tf::HandleFromInput(context, 0), &variable));
    OP_REQUIRES_OK(context, tf::LookupResource(context, tf::HandleFromInput(context, 1), &buffer));
    OP_REQUIRES(context, variable.get() != buffer.get(),
                absl::InvalidArgumentError("the variable is to have a buffer of its own"));
    const tf::Tensor& gradient = context->input(2);
    Rule rule = rule_;
    OP_REQUIRES(context, context->input(3).NumElements() == 1 && context->input(4).NumElements() == 1,
                absl::InvalidArgumentError("factor and rate are to be one number each"));
    rule.factor = context->input(3).flat<float>()(0);
    rule.rate = context->input(4).flat<float>()(0);

    // In the order of their addresses, as all operations that take several: no two then wait for each other.
    const bool variable_first = std::less<>()(variable->mu(), buffer->mu());
    const tf::mutex_lock lock(*(variable_first ? variable : buffer)->mu());
    const tf::mutex_lock other_lock(*(variable_first ? buffer : variable)->mu());
    for (tf::Var* one : {variable.get(), buffer.get()}) {
      OP_REQUIRES(context, one->tensor()->IsInitialized() && one->tensor()->dtype() == tf::DT_FLOAT,
                  absl::FailedPreconditionError("variable and buffer are to hold float32 numbers"));
      OP_REQUIRES(context, one->tensor()->shape() == gradient.shape(),
                  absl::InvalidArgumentError(absl::StrCat("the gradient is ", gradient.shape().DebugString(), ", but its ",
                                                          one == buffer.get() ? "buffer " : "variable ",
                                                          one->tensor()->shape().DebugString())));
    }
    bool in_common, buffer_in_common;
    OP_REQUIRES_OK(context, IsInCommon(context, *variable->tensor(), &in_common));
    OP_REQUIRES_OK(context, IsInCommon(context, *buffer->tensor(), &buffer_in_common));
    OP_REQUIRES(context, in_common == buffer_in_common,
                absl::FailedPreconditionError("variable and buffer are both to be in common or both this rank's own"));
    int64_t first = 0, end = gradient.NumElements();
    if (in_common) {
      first = hpctrain::BeginOfShare(gradient.NumElements(), part_, parts_);
      end = hpctrain::BeginOfShare(gradient.NumElements(), part_ + 1, parts_);
    } else {
      for (tf::Var* one : {variable.get(), buffer.get()}) OP_REQUIRES_OK(context, MakeOwn(context, one->tensor()));
    }
    hpctrain::Summands summands;
    if (given_ > 0) {
      OP_REQUIRES_OK(context, summands.Find(context, 5 + memories_, parts_));
      OP_REQUIRES(context, summands.Of<float>(0, summands_offset_, gradient.NumElements()) != nullptr,
                  absl::InvalidArgumentError("the gradient is to have been laid out"));
    }
    const float* from = gradient.flat<float>().data() + first;
    float* weights = variable->tensor()->flat<float>().data() + first;
    float* moved = buffer->tensor()->flat<float>().data() + first;
    const auto& threads = *context->device()->tensorflow_cpu_worker_threads();
    tf::Shard(threads.num_threads, threads.workers, end - first, kCycles, [&](int64_t begin, int64_t last) {
      if (given_ == 0) {
        Update(rule, from + begin, weights + begin, moved + begin, last - begin);
        return;
      }
      float sum[hpctrain::kBlock];
      for (int64_t at = begin; at < last; at += hpctrain::kBlock) {
        const int64_t n = std::min(hpctrain::kBlock, last - at);
        const auto of_rank = [&](int rank) {
          return (rank == part_ ? from : summands.Of<float>(rank, summands_offset_, 0) + first) + at;
        };
        hpctrain::AddRanks(parts_, of_rank, n, sum, sum);
        Update(rule, sum, weights + at, moved + at, n);
      }
    });
  }

 private:
  // Copies what a reader of the variable still holds, so that it keeps what it has read.
  static absl::Status MakeOwn(tf::OpKernelContext* context, tf::Tensor* held) {
    if (held->RefCountIsOne()) return absl::OkStatus();
    tf::Tensor copy;
    TF_RETURN_IF_ERROR(context->allocate_temp(tf::DT_FLOAT, held->shape(), &copy));
    copy.flat<float>() = held->flat<float>();
    *held = copy;
    return absl::OkStatus();
  }

  // Whether the variable lies in the memory that the ranks of the host have in common.
  absl::Status IsInCommon(tf::OpKernelContext* context, const tf::Tensor& held, bool* in_common) const {
    *in_common = false;
    if (memories_ == 0) return absl::OkStatus();
    tf::core::RefCountPtr<tf::Var> memory;
    TF_RETURN_IF_ERROR(tf::LookupResource(context, tf::HandleFromInput(context, 5), &memory));
    const absl::string_view all = memory->tensor()->tensor_data(), own = held.tensor_data();
    *in_common = own.data() >= all.data() && own.data() + own.size() <= all.data() + all.size();
    return absl::OkStatus();
  }

  static constexpr int64_t kCycles = 5;  // a number takes: five times four bytes are read or written
  Rule rule_;
  int part_, parts_, memories_, given_;
  int64_t summands_offset_;
};

REGISTER_OP("HpctrainMomentum")
    .Input("variable: resource")
    .Input("buffer: resource")
    .Input("gradient: float")
    .Input("factor: float")
    .Input("rate: float")
    .Input("memory: in_common * resource")
    .Input("summands: given * resource")
    .Attr("in_common: int >= 0 = 0")
    .Attr("given: int >= 0 = 0")
    .Attr("summands_offset: int = 0")
    .Attr("part: int = 0")
    .Attr("parts: int = 1")
    .Attr("momentum: float")
    .Attr("decay: float")
    .Attr("nesterov: bool")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::NoOutputs);

REGISTER_KERNEL_BUILDER(Name("HpctrainMomentum").Device(tf::DEVICE_CPU), Momentum);

}  // namespace
