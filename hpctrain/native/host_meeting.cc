// TensorFlow operation HpctrainHostMeeting: waits until all ranks of the host are there.
//
// The first input is the variable over the memory that they have in common. The others are variables in it. When a rank
// has assigned to one, which moves that variable to memory of the rank's own, all ranks take copies of all of them, so that
// each goes on with what it sees. If gradients are being added up (host_summands.cc), each also needs all of the sums then,
// not its share alone: the ranks lay out what the others could do without so far.

#include <cstring>
#include <vector>

#include "absl/status/status.h"
#include "host_memory.h"
#include "host_share.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace {

namespace tf = tensorflow;

class HostMeeting : public tf::OpKernel {
 public:
  explicit HostMeeting(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("ranks", &ranks_));
    OP_REQUIRES_OK(context, context->GetAttr("rank", &rank_));
    OP_REQUIRES_OK(context, context->GetAttr("offsets", &offsets_));
    OP_REQUIRES_OK(context, context->GetAttr("summand_offsets", &summand_offsets_));
    OP_REQUIRES(context, 0 <= rank_ && rank_ < ranks_, absl::InvalidArgumentError("rank is to be one of ranks"));
  }

  void Compute(tf::OpKernelContext* context) override {
    tf::core::RefCountPtr<tf::Var> memory;
    hpctrain::Header* header;
    OP_REQUIRES_OK(context, hpctrain::FindHeader(context, 0, &memory, &header));
    uint8_t* start = memory->tensor()->flat<uint8_t>().data();
    const int gradients = summand_offsets_.size(), given = gradients > 0;
    OP_REQUIRES(context, int(offsets_.size()) == context->num_inputs() - 1 - given - gradients,
                absl::InvalidArgumentError("each variable and each gradient is to have an offset"));

    std::vector<tf::core::RefCountPtr<tf::Var>> variables(offsets_.size());
    bool apart = false;
    for (size_t i = 0; i < variables.size(); ++i) {
      OP_REQUIRES_OK(context, tf::LookupResource(context, tf::HandleFromInput(context, i + 1), &variables[i]));
      const tf::tf_shared_lock lock(*variables[i]->mu());
      apart |= variables[i]->tensor()->data() != start + offsets_[i];
    }
    if (apart) header->apart.store(1);
    header->barrier.Wait(ranks_, [] {});
    if (header->apart.load() == 0) return;
    for (size_t i = 0; i < variables.size(); ++i) {
      const tf::mutex_lock lock(*variables[i]->mu());
      tf::Tensor* held = variables[i]->tensor();
      if (held->data() != start + offsets_[i]) continue;
      tf::Tensor copy;
      OP_REQUIRES_OK(context, context->allocate_temp(tf::DT_FLOAT, held->shape(), &copy));
      copy.flat<float>() = held->flat<float>();
      *held = copy;
    }
    if (!given) return;
    hpctrain::Summands summands;
    OP_REQUIRES_OK(context, summands.Find(context, 1 + offsets_.size(), ranks_));
    for (int i = 0; i < gradients; ++i) {
      const tf::Tensor& gradient = context->input(2 + offsets_.size() + i);
      const int64_t count = gradient.NumElements(), own = hpctrain::BeginOfShare(count, rank_, ranks_);
      float* to = summands.Of<float>(rank_, summand_offsets_[i], count);
      OP_REQUIRES(context, to != nullptr, absl::InvalidArgumentError("there is no room for a gradient"));
      std::memcpy(to + own, gradient.flat<float>().data() + own,
                  (hpctrain::BeginOfShare(count, rank_ + 1, ranks_) - own) * sizeof(float));
    }
    header->barrier.Wait(ranks_, [] {});
  }

 private:
  int rank_, ranks_;
  std::vector<int64_t> offsets_, summand_offsets_;
};

REGISTER_OP("HpctrainHostMeeting")
    .Input("memory: resource")
    .Input("variables: number * resource")
    .Input("summands: given * resource")
    .Input("gradients: gradient_number * float")
    .Attr("number: int >= 0")
    .Attr("given: int >= 0")
    .Attr("gradient_number: int >= 0")
    .Attr("rank: int >= 0")
    .Attr("ranks: int >= 1")
    .Attr("offsets: list(int)")
    .Attr("summand_offsets: list(int)")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::NoOutputs);

REGISTER_KERNEL_BUILDER(Name("HpctrainHostMeeting").Device(tf::DEVICE_CPU), HostMeeting);

}  // namespace
