// What the ranks of a host have in common, as the operations find it. `training/host_weights.py` sets it up.

#ifndef HPCTRAIN_NATIVE_HOST_MEMORY_H_
#define HPCTRAIN_NATIVE_HOST_MEMORY_H_

#include <atomic>
#include <cstdint>

#include "absl/status/status.h"
#include "host_barrier.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace hpctrain {

// What the memory with the weights begins with; zeros are its first state.
struct Header {
  HostBarrier barrier;
  std::atomic<uint32_t> apart;  // whether a rank has found a variable elsewhere, so that all have their own
};

// The variable of bytes behind a handle that is an operation's input.
inline absl::Status FindBytes(tensorflow::OpKernelContext* context, int input, int64_t least,
                              tensorflow::core::RefCountPtr<tensorflow::Var>* found) {
  TF_RETURN_IF_ERROR(tensorflow::LookupResource(context, tensorflow::HandleFromInput(context, input), found));
  const tensorflow::Tensor& bytes = *(*found)->tensor();
  if (bytes.dtype() == tensorflow::DT_UINT8 && bytes.NumElements() >= least) return absl::OkStatus();
  return absl::InvalidArgumentError("the memory of the host is to be bytes, and large enough");
}

inline absl::Status FindHeader(tensorflow::OpKernelContext* context, int input,
                               tensorflow::core::RefCountPtr<tensorflow::Var>* memory, Header** header) {
  TF_RETURN_IF_ERROR(FindBytes(context, input, sizeof(Header), memory));
  *header = reinterpret_cast<Header*>((*memory)->tensor()->flat<uint8_t>().data());
  return absl::OkStatus();
}

// Memory in which each rank lays out its summands for the others: as much for each rank, which begins with room for sums
// of squares, and has the summands of a variable at the same offset for each rank.
class Summands {
 public:
  absl::Status Find(tensorflow::OpKernelContext* context, int input, int ranks) {
    TF_RETURN_IF_ERROR(FindBytes(context, input, 0, &variable_));
    bytes_a_rank_ = variable_->tensor()->NumElements() / ranks;
    return absl::OkStatus();
  }

  // Where rank number `rank` has `count` numbers; nullptr if they are not in its memory.
  template <typename Number>
  Number* Of(int rank, int64_t offset, int64_t count) const {
    if (offset < 0 || offset + count * int64_t(sizeof(Number)) > bytes_a_rank_) return nullptr;
    return reinterpret_cast<Number*>(variable_->tensor()->flat<uint8_t>().data() + rank * bytes_a_rank_ + offset);
  }

 private:
  tensorflow::core::RefCountPtr<tensorflow::Var> variable_;
  int64_t bytes_a_rank_ = 0;
};

}  // namespace hpctrain

#endif  // HPCTRAIN_NATIVE_HOST_MEMORY_H_
