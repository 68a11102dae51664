// TensorFlow operation HpctrainCropResize: cut a box out of a decoded image, resize it to a square by bilinear
// interpolation, mirror it, and normalize it, in one pass over the pixels.
//
// It computes what tf.raw_ops.ResizeBilinear(half_pixel_centers=True), tf.reverse, a multiplication and an addition
// compute one after the other. Written against TensorFlow's C interface (tensorflow/c/kernels.h and ops.h), which
// compiles in a second and does not change from release to release.
//
// Results are the same on every CPU: no fused multiply-add (-ffp-contract=off), and each output pixel is computed by
// the same operations in the same order whatever the width of the vectors.

#include <cstdint>
#include <cstring>
#include <vector>

#include "tensorflow/c/kernels.h"
#include "tensorflow/c/ops.h"
#include "tensorflow/c/tf_tensor.h"

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace {

constexpr int kChannels = 3;
typedef float Pixel __attribute__((vector_size(16), aligned(4), may_alias));  // three channels, and one that is ignored

struct Kernel {
  int64_t size;
  float scale[kChannels], shift[kChannels];
};

// Where an output coordinate lies between two input coordinates.
struct Place {
  int64_t lower, upper;
  float weight;  // of the upper
};

std::vector<Place> Places(int64_t outputs, int64_t inputs) {
  const float step = static_cast<float>(inputs) / static_cast<float>(outputs);
  std::vector<Place> places(outputs);
  for (int64_t i = 0; i < outputs; ++i) {
    const float at = (static_cast<float>(i) + 0.5f) * step - 0.5f;
    const int64_t floor = static_cast<int64_t>(at + 1.0f) - 1;  // at is above -1
    places[i].lower = floor < 0 ? 0 : floor;
    places[i].upper = floor + 1 < inputs ? floor + 1 : inputs - 1;
    places[i].weight = at - static_cast<float>(floor);
  }
  return places;
}

FOR_EACH_CPU void BlendRows(const uint8_t* upper, const uint8_t* lower, float weight, int64_t count, float* row) {
  for (int64_t i = 0; i < count; ++i) {
    const float a = static_cast<float>(upper[i]);
    row[i] = a + (static_cast<float>(lower[i]) - a) * weight;
  }
}

Pixel Load(const float* from) {
  Pixel pixel;
  std::memcpy(&pixel, from, sizeof(pixel));
  return pixel;
}

// `row` has one float more than its pixels, and so has `out` but for the last pixel of an image.
void BlendColumns(const float* row, const std::vector<Place>& columns, Pixel scale, Pixel shift, bool flip, bool last,
                  float* out) {
  const int64_t size = static_cast<int64_t>(columns.size());
  for (int64_t x = 0; x < size; ++x) {
    const Place& place = columns[flip ? size - 1 - x : x];
    const Pixel a = Load(row + place.lower * kChannels), b = Load(row + place.upper * kChannels);
    const Pixel value = (a + (b - a) * place.weight) * scale + shift;
    const bool only_three = last && x == size - 1;
    std::memcpy(out + x * kChannels, &value, only_three ? kChannels * sizeof(float) : sizeof(value));
  }
}

void* Create(TF_OpKernelConstruction* context) {
  Kernel* kernel = new Kernel();
  TF_Status* status = TF_NewStatus();
  TF_OpKernelConstruction_GetAttrInt64(context, "size", &kernel->size, status);
  if (TF_GetCode(status) == TF_OK) {
    TF_OpKernelConstruction_GetAttrFloatList(context, "scale", kernel->scale, kChannels, status);
  }
  if (TF_GetCode(status) == TF_OK) {
    TF_OpKernelConstruction_GetAttrFloatList(context, "shift", kernel->shift, kChannels, status);
  }
  if (TF_GetCode(status) == TF_OK && kernel->size < 1) {
    TF_SetStatus(status, TF_INVALID_ARGUMENT, "size is less than one pixel");
  }
  if (TF_GetCode(status) != TF_OK) TF_OpKernelConstruction_Failure(context, status);
  TF_DeleteStatus(status);
  return kernel;
}

void Delete(void* kernel) { delete static_cast<Kernel*>(kernel); }

void Run(const Kernel& kernel, TF_Tensor* image, TF_Tensor* box, TF_Tensor* flip, TF_OpKernelContext* context,
         TF_Status* status) {
  if (TF_NumDims(image) != 3 || TF_Dim(image, 2) != kChannels || TF_TensorElementCount(box) != 4 ||
      TF_TensorElementCount(flip) != 1) {
    TF_SetStatus(status, TF_INVALID_ARGUMENT, "expected an image [height, width, 3], a box [4] and a flip []");
    return;
  }
  const int32_t* edges = static_cast<const int32_t*>(TF_TensorData(box));
  const int64_t top = edges[0], left = edges[1], height = edges[2], width = edges[3];
  const int64_t row_length = TF_Dim(image, 1) * kChannels;
  if (top < 0 || left < 0 || height < 1 || width < 1 || top + height > TF_Dim(image, 0) ||
      left + width > TF_Dim(image, 1)) {
    TF_SetStatus(status, TF_INVALID_ARGUMENT, "the box is not inside the image");
    return;
  }
  const int64_t shape[3] = {kernel.size, kernel.size, kChannels};
  const size_t bytes = static_cast<size_t>(kernel.size) * kernel.size * kChannels * sizeof(float);
  TF_Tensor* output = TF_AllocateOutput(context, 0, TF_FLOAT, shape, 3, bytes, status);
  if (TF_GetCode(status) != TF_OK) return;
  const uint8_t* pixels = static_cast<const uint8_t*>(TF_TensorData(image)) + top * row_length + left * kChannels;
  float* out = static_cast<float*>(TF_TensorData(output));
  const std::vector<Place> rows = Places(kernel.size, height), columns = Places(kernel.size, width);
  const Pixel scale = {kernel.scale[0], kernel.scale[1], kernel.scale[2], 0.0f};
  const Pixel shift = {kernel.shift[0], kernel.shift[1], kernel.shift[2], 0.0f};
  const bool mirror = *static_cast<const bool*>(TF_TensorData(flip));
  std::vector<float> row(width * kChannels + 1);
  for (int64_t y = 0; y < kernel.size; ++y) {
    BlendRows(pixels + rows[y].lower * row_length, pixels + rows[y].upper * row_length, rows[y].weight,
              width * kChannels, row.data());
    BlendColumns(row.data(), columns, scale, shift, mirror, y == kernel.size - 1, out + y * kernel.size * kChannels);
  }
  TF_DeleteTensor(output);
}

void Compute(void* kernel, TF_OpKernelContext* context) {
  TF_Status* status = TF_NewStatus();
  TF_Tensor* inputs[3] = {nullptr, nullptr, nullptr};
  for (int i = 0; i < 3 && TF_GetCode(status) == TF_OK; ++i) TF_GetInput(context, i, &inputs[i], status);
  if (TF_GetCode(status) == TF_OK) {
    Run(*static_cast<Kernel*>(kernel), inputs[0], inputs[1], inputs[2], context, status);
  }
  if (TF_GetCode(status) != TF_OK) TF_OpKernelContext_Failure(context, status);
  for (TF_Tensor* input : inputs) {
    if (input != nullptr) TF_DeleteTensor(input);
  }
  TF_DeleteStatus(status);
}

void UnknownShape(TF_ShapeInferenceContext* context, TF_Status* status) {
  TF_ShapeInferenceContextSetUnknownShape(context, status);  // the caller sets it, who knows the size
}

bool Register() {
  TF_Status* status = TF_NewStatus();
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder("HpctrainCropResize");
  TF_OpDefinitionBuilderAddInput(op, "image: uint8");
  TF_OpDefinitionBuilderAddInput(op, "box: int32");
  TF_OpDefinitionBuilderAddInput(op, "flip: bool");
  TF_OpDefinitionBuilderAddAttr(op, "size: int");
  TF_OpDefinitionBuilderAddAttr(op, "scale: list(float) >= 3");
  TF_OpDefinitionBuilderAddAttr(op, "shift: list(float) >= 3");
  TF_OpDefinitionBuilderAddOutput(op, "pixels: float");
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, &UnknownShape);
  TF_RegisterOpDefinition(op, status);
  if (TF_GetCode(status) == TF_OK) {
    TF_KernelBuilder* builder = TF_NewKernelBuilder("HpctrainCropResize", "CPU", &Create, &Compute, &Delete);
    TF_RegisterKernelBuilder("HpctrainCropResize", builder, status);
  }
  const bool done = TF_GetCode(status) == TF_OK;
  TF_DeleteStatus(status);
  return done;
}

const bool registered = Register();

}  // namespace
