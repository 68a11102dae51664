// TensorFlow operation HpctrainCropResize: cut a box out of each decoded image of a batch, resize it to a square by
// bilinear interpolation, mirror it, and normalize it, in one pass over the pixels and straight into the batch.
//
// It computes what tf.raw_ops.ResizeBilinear(half_pixel_centers=True), tf.reverse, a multiplication and an addition
// compute one after the other. Written against TensorFlow's C interface (tensorflow/c/kernels.h and ops.h), which
// compiles in a second and does not change from release to release.
//
// Results are the same on every CPU: no fused multiply-add (-ffp-contract=off), and each output pixel is computed by
// the same operations in the same order whatever the width of the vectors.

#include <algorithm>
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

struct Image {
  const uint8_t* pixels;
  int64_t height, width;
};

// Where an output coordinate lies between two input coordinates.
struct Place {
  int32_t lower, upper;
  float weight;  // of the upper
};

std::vector<Place> Places(int64_t outputs, int64_t inputs) {
  const float step = static_cast<float>(inputs) / static_cast<float>(outputs);
  std::vector<Place> places(outputs);
  for (int64_t i = 0; i < outputs; ++i) {
    const float at = (static_cast<float>(i) + 0.5f) * step - 0.5f;
    const int64_t floor = static_cast<int64_t>(at + 1.0f) - 1;  // at is above -1
    places[i].lower = static_cast<int32_t>(floor < 0 ? 0 : floor);
    places[i].upper = static_cast<int32_t>(floor + 1 < inputs ? floor + 1 : inputs - 1);
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

inline void BlendPixel(const float* row, const Place& place, Pixel scale, Pixel shift, float* out, size_t bytes) {
  const Pixel a = Load(row + place.lower), b = Load(row + place.upper);
  const Pixel value = (a + (b - a) * place.weight) * scale + shift;
  std::memcpy(out, &value, bytes);
}

// `row` has one float more than its pixels. Each pixel is written with a fourth float, which the next one overwrites;
// only the last pixel of an image has no next one.
void BlendColumns(const float* row, const std::vector<Place>& columns, Pixel scale, Pixel shift, bool last_row,
                  float* out) {
  const int64_t before_last = static_cast<int64_t>(columns.size()) - 1;
  for (int64_t x = 0; x < before_last; ++x) {
    BlendPixel(row, columns[x], scale, shift, out + x * kChannels, sizeof(Pixel));
  }
  BlendPixel(row, columns[before_last], scale, shift, out + before_last * kChannels,
             last_row ? kChannels * sizeof(float) : sizeof(Pixel));
}

void CropResize(const Kernel& kernel, const Image& image, const int32_t* box, bool flip, std::vector<float>* row,
                float* out) {
  const int64_t top = box[0], left = box[1], height = box[2], width = box[3];
  const int64_t row_length = image.width * kChannels;
  const uint8_t* pixels = image.pixels + top * row_length + left * kChannels;
  const std::vector<Place> rows = Places(kernel.size, height);
  std::vector<Place> columns = Places(kernel.size, width);
  for (Place& place : columns) {
    place.lower *= kChannels;
    place.upper *= kChannels;
  }
  if (flip) std::reverse(columns.begin(), columns.end());
  const Pixel scale = {kernel.scale[0], kernel.scale[1], kernel.scale[2], 0.0f};
  const Pixel shift = {kernel.shift[0], kernel.shift[1], kernel.shift[2], 0.0f};
  row->resize(width * kChannels + 1);
  for (int64_t y = 0; y < kernel.size; ++y) {
    BlendRows(pixels + rows[y].lower * row_length, pixels + rows[y].upper * row_length, rows[y].weight,
              width * kChannels, row->data());
    BlendColumns(row->data(), columns, scale, shift, y == kernel.size - 1, out + y * kernel.size * kChannels);
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

// Adds the images of an input, one [height, width, 3] or several [n, height, width, 3].
bool AddImages(TF_Tensor* input, std::vector<Image>* images) {
  const int dims = TF_NumDims(input);
  if ((dims != 3 && dims != 4) || TF_Dim(input, dims - 1) != kChannels) return false;
  const int64_t count = dims == 4 ? TF_Dim(input, 0) : 1;
  const int64_t height = TF_Dim(input, dims - 3), width = TF_Dim(input, dims - 2);
  const uint8_t* pixels = static_cast<const uint8_t*>(TF_TensorData(input));
  for (int64_t i = 0; i < count; ++i) images->push_back({pixels + i * height * width * kChannels, height, width});
  return true;
}

void Run(const Kernel& kernel, const std::vector<TF_Tensor*>& inputs, TF_OpKernelContext* context, TF_Status* status) {
  TF_Tensor* boxes = inputs[inputs.size() - 2];
  TF_Tensor* flips = inputs[inputs.size() - 1];
  std::vector<Image> images;
  bool good = true;
  for (size_t i = 0; i + 2 < inputs.size(); ++i) good = good && AddImages(inputs[i], &images);
  const int64_t count = static_cast<int64_t>(images.size());
  if (!good || TF_TensorElementCount(boxes) != 4 * count || TF_TensorElementCount(flips) != count) {
    TF_SetStatus(status, TF_INVALID_ARGUMENT,
                 "expected images [height, width, 3] or [n, height, width, 3], and a box [4] and a flip for each");
    return;
  }
  const int32_t* box = static_cast<const int32_t*>(TF_TensorData(boxes));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t top = box[4 * i], left = box[4 * i + 1], height = box[4 * i + 2], width = box[4 * i + 3];
    if (top < 0 || left < 0 || height < 1 || width < 1 || top + height > images[i].height ||
        left + width > images[i].width) {
      TF_SetStatus(status, TF_INVALID_ARGUMENT, "a box is not inside its image");
      return;
    }
  }
  const int64_t shape[4] = {count, kernel.size, kernel.size, kChannels};
  const int64_t image_floats = kernel.size * kernel.size * kChannels;
  TF_Tensor* output =
      TF_AllocateOutput(context, 0, TF_FLOAT, shape, 4, static_cast<size_t>(count * image_floats) * sizeof(float), status);
  if (TF_GetCode(status) != TF_OK) return;
  float* out = static_cast<float*>(TF_TensorData(output));
  const bool* flip = static_cast<const bool*>(TF_TensorData(flips));
  std::vector<float> row;
  for (int64_t i = 0; i < count; ++i) {
    CropResize(kernel, images[i], box + 4 * i, flip[i], &row, out + i * image_floats);
  }
  TF_DeleteTensor(output);
}

void Compute(void* kernel, TF_OpKernelContext* context) {
  TF_Status* status = TF_NewStatus();
  std::vector<TF_Tensor*> inputs(TF_NumInputs(context), nullptr);
  for (size_t i = 0; i < inputs.size() && TF_GetCode(status) == TF_OK; ++i) {
    TF_GetInput(context, static_cast<int>(i), &inputs[i], status);
  }
  if (TF_GetCode(status) == TF_OK) Run(*static_cast<Kernel*>(kernel), inputs, context, status);
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
  TF_OpDefinitionBuilderAddInput(op, "images: N * uint8");
  TF_OpDefinitionBuilderAddInput(op, "boxes: int32");
  TF_OpDefinitionBuilderAddInput(op, "flips: bool");
  TF_OpDefinitionBuilderAddAttr(op, "N: int >= 1");
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
