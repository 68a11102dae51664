// TensorFlow operation HpctrainHostMeeting: waits until all ranks of the host are there.
//
// The first input is the variable over the memory that they have in common, which `training/host_weights.py` sets up:
// it begins with a Header. The others are variables in it. When a rank has assigned to one, which moves that variable to
// memory of the rank's own, all ranks take copies of all of them, so that each goes on with what it sees.

#include <atomic>
#include <vector>

#include "absl/status/status.h"
#include "host_barrier.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace {

namespace tf = tensorflow;

// Zeros are its first state.
struct Header {
  hpctrain::HostBarrier barrier;
  std::atomic<uint32_t> apart;  // whether a rank has found a variable elsewhere
};

class HostMeeting : public tf::OpKernel {
 public:
  explicit HostMeeting(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("ranks", &ranks_));
    OP_REQUIRES_OK(context, context->GetAttr("offsets", &offsets_));
  }

  void Compute(tf::OpKernelContext* context) override {
    tf::core::RefCountPtr<tf::Var> memory;
    OP_REQUIRES_OK(context, tf::LookupResource(context, tf::HandleFromInput(context, 0), &memory));
    OP_REQUIRES(context,
                memory->tensor()->dtype() == tf::DT_UINT8 && memory->tensor()->NumElements() >= int64_t(sizeof(Header)),
                absl::InvalidArgumentError("the memory of the host is to be bytes, and to have room for a barrier"));
    OP_REQUIRES(context, int(offsets_.size()) == context->num_inputs() - 1,
                absl::InvalidArgumentError("each variable is to have an offset"));
    uint8_t* start = memory->tensor()->flat<uint8_t>().data();
    Header* header = reinterpret_cast<Header*>(start);

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
  }

 private:
  int ranks_;
  std::vector<int64_t> offsets_;
};

REGISTER_OP("HpctrainHostMeeting")
    .Input("memory: resource")
    .Input("variables: number * resource")
    .Attr("number: int >= 0")
    .Attr("ranks: int >= 1")
    .Attr("offsets: list(int)")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::NoOutputs);

REGISTER_KERNEL_BUILDER(Name("HpctrainHostMeeting").Device(tf::DEVICE_CPU), HostMeeting);

}  // namespace
