// TensorFlow operations HpctrainCropResize and HpctrainDecodeCropResize: cut a box out of each image of a batch, resize it
// to a square by bilinear interpolation, mirror it, and normalize it, in one pass over the pixels and straight into the
// batch. The first takes decoded images. The second decodes the boxes of JPEG files, by TensorFlow's own decoder, one
// after the other into the same memory, which stays in the cache.
//
// They compute what tf.image.decode_and_crop_jpeg, tf.raw_ops.ResizeBilinear(half_pixel_centers=True), tf.reverse, a
// multiplication and an addition compute one after the other.
//
// Results are the same on every CPU: no fused multiply-add (-ffp-contract=off), and each output pixel is computed by
// the same operations in the same order whatever the width of the vectors.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "each_cpu.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/lib/jpeg/jpeg_mem.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace {

namespace tf = tensorflow;

constexpr int kChannels = 3;
constexpr int32_t kLongestSide = 65535;  // of a JPEG
typedef float Pixel __attribute__((vector_size(16), aligned(4), may_alias));  // three channels, and one that is ignored

// What becomes of the pixels: images of size x size pixels, which are pixel * scale + shift.
struct Target {
  int64_t size;
  std::vector<float> scale, shift;

  int64_t floats() const { return size * size * kChannels; }
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

Pixel Load(const float* from) {
  Pixel pixel;
  std::memcpy(&pixel, from, sizeof(pixel));
  return pixel;
}

// Where the floats of four output pixels come from: from the 32 after `first`, at `lower` and `upper`.
struct Four {
  int32_t first;
  int32_t lower[16], upper[16];
  float weight[16];
};

constexpr int kFour = 4, kFourFloats = kFour * kChannels, kReach = 32;

// The columns of an output row: places count floats.
struct Columns {
  std::vector<Place> places;
  std::vector<Four> fours;  // of the first pixels, as far as 32 floats reach

  Columns(int64_t outputs, int64_t inputs, bool flip) : places(Places(outputs, inputs)) {
    for (Place& place : places) {
      place.lower *= kChannels;
      place.upper *= kChannels;
    }
    if (flip) std::reverse(places.begin(), places.end());
    fours.reserve(places.size() / kFour);
    for (size_t x = 0; x + kFour <= places.size() && AddFour(places.data() + x); x += kFour) {
    }
  }

  int64_t size() const { return static_cast<int64_t>(places.size()); }

 private:
  bool AddFour(const Place* four) {
    const int32_t first = std::min(four[0].lower, four[kFour - 1].lower);
    if (std::max(four[0].upper, four[kFour - 1].upper) + kChannels > first + kReach) return false;
    Four& added = fours.emplace_back();
    added.first = first;
    for (int i = 0; i < kFourFloats; ++i) {
      const Place& place = four[i / kChannels];
      added.lower[i] = place.lower - first + i % kChannels;
      added.upper[i] = place.upper - first + i % kChannels;
      added.weight[i] = place.weight;
    }
    return true;
  }
};

#if defined(__x86_64__) && defined(__GNUC__)
bool HasAvx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f");
}

const bool kAvx512 = HasAvx512();

#pragma GCC push_options
#pragma GCC target("avx512f")
// Blends sixteen floats of two rows at a time and returns how many.
int64_t BlendSixteens(const uint8_t* upper, const uint8_t* lower, float weight, int64_t count, float* row) {
  const __m512 weights = _mm512_set1_ps(weight);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i above = _mm_loadu_si128(reinterpret_cast<const __m128i*>(upper + i));
    const __m128i below = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lower + i));
    const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(above));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(below));
    _mm512_storeu_ps(row + i, _mm512_add_ps(a, _mm512_mul_ps(_mm512_sub_ps(b, a), weights)));
  }
  return i;
}

// Blends four pixels of a row at a time, as long as there is room for the four floats that are written after them;
// returns how many.
int64_t BlendFours(const float* row, const Columns& columns, Pixel scale, Pixel shift, int64_t room, float* out) {
  const __m512i channels = _mm512_setr_epi32(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0);
  const __m512 scales = _mm512_permutexvar_ps(channels, _mm512_broadcast_f32x4(reinterpret_cast<__m128>(scale)));
  const __m512 shifts = _mm512_permutexvar_ps(channels, _mm512_broadcast_f32x4(reinterpret_cast<__m128>(shift)));
  int64_t x = 0;
  for (const Four& four : columns.fours) {
    if (x * kChannels + 16 > room) break;
    const __m512 near = _mm512_loadu_ps(row + four.first), far = _mm512_loadu_ps(row + four.first + 16);
    const __m512 a = _mm512_permutex2var_ps(near, _mm512_loadu_si512(four.lower), far);
    const __m512 b = _mm512_permutex2var_ps(near, _mm512_loadu_si512(four.upper), far);
    const __m512 value = _mm512_add_ps(a, _mm512_mul_ps(_mm512_sub_ps(b, a), _mm512_loadu_ps(four.weight)));
    _mm512_storeu_ps(out + x * kChannels, _mm512_add_ps(_mm512_mul_ps(value, scales), shifts));
    x += kFour;
  }
  return x;
}
#pragma GCC pop_options
#else
constexpr bool kAvx512 = false;
int64_t BlendSixteens(const uint8_t*, const uint8_t*, float, int64_t, float*) { return 0; }
int64_t BlendFours(const float*, const Columns&, Pixel, Pixel, int64_t, float*) { return 0; }
#endif

FOR_EACH_CPU void BlendRows(const uint8_t* upper, const uint8_t* lower, float weight, int64_t count, float* row) {
  for (int64_t i = kAvx512 ? BlendSixteens(upper, lower, weight, count, row) : 0; i < count; ++i) {
    const float a = static_cast<float>(upper[i]);
    row[i] = a + (static_cast<float>(lower[i]) - a) * weight;
  }
}

inline void BlendPixel(const float* row, const Place& place, Pixel scale, Pixel shift, float* out, size_t bytes) {
  const Pixel a = Load(row + place.lower), b = Load(row + place.upper);
  const Pixel value = (a + (b - a) * place.weight) * scale + shift;
  std::memcpy(out, &value, bytes);
}

// `row` has kReach floats more than its pixels. Pixels are written with a fourth float each, or four floats after four
// pixels, which the next ones overwrite; only after the last pixel of an image is no room for that.
void BlendColumns(const float* row, const Columns& columns, Pixel scale, Pixel shift, bool last_row, float* out) {
  const int64_t before_last = columns.size() - 1, floats = columns.size() * kChannels;
  int64_t x = kAvx512 ? BlendFours(row, columns, scale, shift, last_row ? floats : 2 * floats, out) : 0;
  for (; x < before_last; ++x) {
    BlendPixel(row, columns.places[x], scale, shift, out + x * kChannels, sizeof(Pixel));
  }
  if (x == before_last) {
    BlendPixel(row, columns.places[x], scale, shift, out + x * kChannels,
               last_row ? kChannels * sizeof(float) : sizeof(Pixel));
  }
}

void CropResize(const Target& target, const Image& image, const int32_t* box, bool flip, std::vector<float>* row,
                float* out) {
  const int64_t top = box[0], left = box[1], height = box[2], width = box[3];
  const int64_t row_length = image.width * kChannels;
  const uint8_t* pixels = image.pixels + top * row_length + left * kChannels;
  const std::vector<Place> rows = Places(target.size, height);
  const Columns columns(target.size, width, flip);
  const Pixel scale = {target.scale[0], target.scale[1], target.scale[2], 0.0f};
  const Pixel shift = {target.shift[0], target.shift[1], target.shift[2], 0.0f};
  row->resize(width * kChannels + kReach);
  for (int64_t y = 0; y < target.size; ++y) {
    BlendRows(pixels + rows[y].lower * row_length, pixels + rows[y].upper * row_length, rows[y].weight,
              width * kChannels, row->data());
    BlendColumns(row->data(), columns, scale, shift, y == target.size - 1, out + y * target.size * kChannels);
  }
}

// ---------------------------------------------------------------- operations

class ToBatch : public tf::OpKernel {
 public:
  explicit ToBatch(tf::OpKernelConstruction* context) : tf::OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("size", &target_.size));
    OP_REQUIRES_OK(context, context->GetAttr("scale", &target_.scale));
    OP_REQUIRES_OK(context, context->GetAttr("shift", &target_.shift));
    OP_REQUIRES(context, target_.size > 0 && target_.scale.size() == kChannels && target_.shift.size() == kChannels,
                absl::InvalidArgumentError("size is to be a pixel or more, scale and shift three numbers each"));
  }

 protected:
  // Returns where the batch is to go, after a look at the boxes and flips, the last two inputs.
  absl::Status Start(tf::OpKernelContext* context, int64_t count, float** out) const {
    const tf::Tensor &boxes = Boxes(context), &flips = context->input(context->num_inputs() - 1);
    if (boxes.NumElements() != 4 * count || flips.NumElements() != count) {
      return absl::InvalidArgumentError(absl::StrCat("expected a box [4] and a flip for each of ", count, " images, not ",
                                                     boxes.shape().DebugString(), " and ", flips.shape().DebugString()));
    }
    tf::Tensor* batch;
    TF_RETURN_IF_ERROR(
        context->allocate_output(0, tf::TensorShape({count, target_.size, target_.size, kChannels}), &batch));
    *out = batch->flat<float>().data();
    return absl::OkStatus();
  }

  static const tf::Tensor& Boxes(tf::OpKernelContext* context) { return context->input(context->num_inputs() - 2); }
  static const int32_t* Box(tf::OpKernelContext* context, int64_t i) {
    return Boxes(context).flat<int32_t>().data() + 4 * i;
  }
  static bool IsFlipped(tf::OpKernelContext* context, int64_t i) {
    return context->input(context->num_inputs() - 1).flat<bool>()(i);
  }

  Target target_;
};

class CropResizeImages : public ToBatch {
 public:
  using ToBatch::ToBatch;

  void Compute(tf::OpKernelContext* context) override {
    std::vector<Image> images;
    for (int i = 0; i + 2 < context->num_inputs(); ++i) {
      const tf::Tensor& input = context->input(i);  // one image, or several
      const int dims = input.dims();
      OP_REQUIRES(context, (dims == 3 || dims == 4) && input.dim_size(dims - 1) == kChannels,
                  absl::InvalidArgumentError(absl::StrCat("expected images [height, width, 3] or [n, height, width, 3], ",
                                                          "not ", input.shape().DebugString())));
      const int64_t count = dims == 4 ? input.dim_size(0) : 1;
      const int64_t height = input.dim_size(dims - 3), width = input.dim_size(dims - 2);
      for (int64_t j = 0; j < count; ++j) {
        images.push_back({input.flat<uint8_t>().data() + j * height * width * kChannels, height, width});
      }
    }
    float* out;
    OP_REQUIRES_OK(context, Start(context, static_cast<int64_t>(images.size()), &out));
    std::vector<float> row;
    for (size_t i = 0; i < images.size(); ++i) {
      const int32_t* box = Box(context, i);
      const int64_t top = box[0], left = box[1], height = box[2], width = box[3];
      OP_REQUIRES(context,
                  top >= 0 && left >= 0 && height > 0 && width > 0 && top + height <= images[i].height &&
                      left + width <= images[i].width,
                  absl::InvalidArgumentError("a box is not inside its image"));
      CropResize(target_, images[i], box, IsFlipped(context, i), &row, out + i * target_.floats());
    }
  }
};

class DecodeCropResize : public ToBatch {
 public:
  using ToBatch::ToBatch;

  void Compute(tf::OpKernelContext* context) override {
    const auto bytes = context->input(0).flat<uint8_t>();
    const auto offsets = context->input(1).flat<int64_t>();
    const int64_t count = offsets.size() - 1;
    OP_REQUIRES(context, count >= 0 && offsets(0) >= 0 && offsets(count) <= bytes.size() && Rise(offsets),
                absl::InvalidArgumentError("offsets are to rise from 0 at least to the number of bytes at most"));
    float* out;
    OP_REQUIRES_OK(context, Start(context, count, &out));
    std::vector<uint8_t> pixels;
    std::vector<float> row;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t* box = Box(context, i);
      const int64_t file_bytes = offsets(i + 1) - offsets(i);
      tf::jpeg::UncompressFlags flags;
      flags.components = kChannels;
      flags.dct_method = JDCT_IFAST;
      flags.fancy_upscaling = false;
      flags.crop = true;
      flags.crop_y = box[0];
      flags.crop_x = box[1];
      flags.crop_height = box[2];
      flags.crop_width = box[3];
      const auto allocate = [&](int width, int height, int channels) {
        const size_t bytes = static_cast<size_t>(width) * height * channels;
        if (pixels.size() < bytes) pixels.resize(bytes);
        return pixels.data();
      };
      // The decoder counts in int, and does not expect sums that are more.
      const bool fits = file_bytes <= std::numeric_limits<int>::max() && box[0] >= 0 && box[1] >= 0 && box[2] > 0 &&
                        box[3] > 0 && box[0] <= kLongestSide - box[2] && box[1] <= kLongestSide - box[3];
      const uint8_t* decoded =
          fits ? tf::jpeg::Uncompress(bytes.data() + offsets(i), static_cast<int>(file_bytes), flags, nullptr, allocate)
               : nullptr;
      OP_REQUIRES(context, decoded != nullptr,
                  absl::InvalidArgumentError(absl::StrCat("image ", i, " of the batch is not a JPEG that can be decoded, ",
                                                          "or its box is not inside")));
      const int32_t whole[] = {0, 0, box[2], box[3]};
      CropResize(target_, {decoded, box[2], box[3]}, whole, IsFlipped(context, i), &row, out + i * target_.floats());
    }
  }

 private:
  static bool Rise(const tf::TTypes<int64_t>::ConstFlat& offsets) {
    return std::is_sorted(offsets.data(), offsets.data() + offsets.size());
  }
};

absl::Status ShapeOfBatch(tf::shape_inference::InferenceContext* context) {
  int64_t size;
  TF_RETURN_IF_ERROR(context->GetAttr("size", &size));
  tf::shape_inference::ShapeHandle boxes;
  TF_RETURN_IF_ERROR(context->WithRank(context->input(context->num_inputs() - 2), 2, &boxes));
  context->set_output(0, context->MakeShape({context->Dim(boxes, 0), context->MakeDim(size), context->MakeDim(size),
                                             context->MakeDim(kChannels)}));
  return absl::OkStatus();
}

REGISTER_OP("HpctrainCropResize")
    .Input("images: N * uint8")
    .Input("boxes: int32")
    .Input("flips: bool")
    .Output("batch: float")
    .Attr("N: int >= 1")
    .Attr("size: int")
    .Attr("scale: list(float)")
    .Attr("shift: list(float)")
    .SetShapeFn(ShapeOfBatch);

REGISTER_OP("HpctrainDecodeCropResize")
    .Input("bytes: uint8")
    .Input("offsets: int64")
    .Input("boxes: int32")
    .Input("flips: bool")
    .Output("batch: float")
    .Attr("size: int")
    .Attr("scale: list(float)")
    .Attr("shift: list(float)")
    .SetShapeFn(ShapeOfBatch);

REGISTER_KERNEL_BUILDER(Name("HpctrainCropResize").Device(tf::DEVICE_CPU), CropResizeImages);
REGISTER_KERNEL_BUILDER(Name("HpctrainDecodeCropResize").Device(tf::DEVICE_CPU), DecodeCropResize);

}  // namespace
