// com.microsoft.MatMulNBits over weights as they lie in the file: nothing is packed, nothing is copied.
//
// Registered under onnxruntime's own name, the operator takes the place of onnxruntime's in the sessions that it is given to, so
// that graphs are the same with it and without. It does what graphs of edgelora ask for: constant weights of 4 or 8 bits in
// blocks of 32 or a multiple, float32 activations, no g_idx; anything else is refused when the session is made.
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"
#include "product.h"

namespace edgelora {
namespace {

enum Input : size_t { kActivations, kCodes, kScales, kZeroPoints, kGroups, kBias, kInputs };

constexpr size_t kPieces = 32;            // that a product is cut into for the threads, where its tiles allow
constexpr size_t kAloneBytes = 64 << 10;  // of weights, times rows, that are not worth waking a thread for
constexpr size_t kRowsAtOnce = 256;       // whose activations stay in the second-level cache

struct Failure {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status != nullptr) throw Failure{status};
}

struct Shape {
  std::vector<int64_t> sizes;
  int type;
};

Shape describe(const Api& api, const OrtValue* tensor) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api.describe(tensor, &info));
  const auto release = [&api](OrtTensorTypeAndShapeInfo* described) { api.release(described); };
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owner(info, release);
  Shape shape{};
  size_t axes = 0;
  check(api.element_type(info, &shape.type));
  check(api.count_axes(info, &axes));
  shape.sizes.resize(axes);
  check(api.shape(info, shape.sizes.data(), axes));
  return shape;
}

// Activations of all products that a thread computes, one after the other.
struct Scratch {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> offsets;

  Activations fit(const Weights& weights, size_t rows) {
    const size_t count = rows * weights.chunks();
    if (scales.size() < count) codes.resize(count * kChunk), scales.resize(count), offsets.resize(count);
    return {codes.data(), scales.data(), offsets.data()};
  }
};

class MatMulNBits {
 public:
  MatMulNBits(const Api& api, const OrtKernelInfo* info, const Kernels& kernels) : api_(api), kernels_(kernels) {
    const int64_t inner = attribute(info, "K"), columns = attribute(info, "N");
    const int64_t bits = attribute(info, "bits"), block = attribute(info, "block_size");
    if (attribute(info, "accuracy_level") != 4) refuse("accuracy_level is not 4, which is what rounds activations to 8 bits");
    constexpr int64_t kMost = int64_t{1} << 31;
    if (inner < 1 || columns < 1 || inner >= kMost || columns >= kMost) refuse("K or N is out of range");
    if (bits != 4 && bits != 8) refuse("bits is not 4 or 8");
    if (block < 32 || block > 2048 || block & (block - 1)) refuse("block_size is not a power of two from 32 to 2048");
    const int64_t blocks = (inner + block - 1) / block, zero_bytes = (blocks * bits + 7) / 8;
    if (tensor(info, kGroups, kAnyType, 0)) refuse("g_idx is not supported");
    weights_.codes = static_cast<const uint8_t*>(tensor(info, kCodes, kUint8, columns * blocks * block * bits / 8));
    weights_.scales = static_cast<const float*>(tensor(info, kScales, kFloat, columns * blocks));
    weights_.zero_points = static_cast<const uint8_t*>(tensor(info, kZeroPoints, kUint8, columns * zero_bytes));
    weights_.bias = static_cast<const float*>(tensor(info, kBias, kFloat, columns));
    if (!weights_.codes || !weights_.scales) refuse("weights or scales are missing");
    weights_.columns = static_cast<size_t>(columns);
    weights_.inner = static_cast<size_t>(inner);
    weights_.blocks = static_cast<size_t>(blocks);
    weights_.block = static_cast<size_t>(block);
    weights_.bits = static_cast<int>(bits);
  }

  void compute(OrtKernelContext* context) const {
    const OrtValue* activations = nullptr;
    check(api_.input(context, kActivations, &activations));
    require_constant(context, kZeroPoints, weights_.zero_points);
    require_constant(context, kGroups, nullptr);
    require_constant(context, kBias, weights_.bias);
    Shape shape = describe(api_, activations);
    if (shape.type != kFloat || shape.sizes.empty() || shape.sizes.back() != static_cast<int64_t>(weights_.inner)) {
      refuse("activations are not float32 of K columns");
    }
    size_t rows = 1;
    for (size_t axis = 0; axis + 1 < shape.sizes.size(); ++axis) rows *= static_cast<size_t>(shape.sizes[axis]);
    shape.sizes.back() = static_cast<int64_t>(weights_.columns);
    OrtValue* output = nullptr;
    void *read = nullptr, *written = nullptr;
    check(api_.output(context, 0, shape.sizes.data(), shape.sizes.size(), &output));
    check(api_.data(activations, &read));
    check(api_.data(output, &written));
    multiply(context, static_cast<const float*>(read), rows, static_cast<float*>(written));
  }

 private:
  int64_t attribute(const OrtKernelInfo* info, const char* name) const {
    int64_t value = 0;
    if (OrtStatus* status = api_.attribute(info, name, &value)) {
      api_.release(status);
      refuse((std::string("attribute ") + name + " is missing").c_str());
    }
    return value;
  }

  // Refuses an optional input that the graph computes, which the constructor could not see.
  void require_constant(const OrtKernelContext* context, size_t index, const void* known) const {
    size_t inputs = 0;
    const OrtValue* value = nullptr;
    check(api_.count_inputs(context, &inputs));
    if (index < inputs) check(api_.input(context, index, &value));
    if (value != nullptr && known == nullptr) refuse("zero_points, g_idx or bias is not a constant");
  }

  // The values of a constant input of that many elements; null where the graph leaves it out, or computes it.
  void* tensor(const OrtKernelInfo* info, size_t index, ElementType type, int64_t count) const {
    size_t inputs = 0;
    check(api_.count_inputs(info, &inputs));
    if (index >= inputs) return nullptr;
    int constant = 0;
    const OrtValue* value = nullptr;
    check(api_.constant_input(info, index, &constant, &value));
    if (!constant || value == nullptr) return nullptr;
    const Shape shape = describe(api_, value);
    int64_t found = 1;
    for (const int64_t size : shape.sizes) found *= size;
    if (type != kAnyType && (shape.type != type || found != count)) refuse("a weight has another type or size than N, K, bits and block_size say");
    void* data = nullptr;
    check(api_.data(value, &data));
    return data;
  }

  void multiply(OrtKernelContext* context, const float* read, size_t rows, float* written) const {
    static thread_local Scratch scratch;
    for (size_t row = 0; row < rows; row += kRowsAtOnce) {
      const size_t count = std::min(kRowsAtOnce, rows - row);
      const Activations rounded = scratch.fit(weights_, count);
      parallel(context, count, count * weights_.inner * sizeof(float), [&](size_t index) {
        const size_t start = index * weights_.chunks();
        kernels_.round(weights_, read + (row + index) * weights_.inner, rounded.codes + start * kChunk, rounded.scales + start, rounded.offsets + start);
      });
      multiply_rounded(context, rounded, count, written + row * weights_.columns);
    }
  }

  void multiply_rounded(OrtKernelContext* context, const Activations& activations, size_t rows, float* written) const {
    const size_t column_bytes = weights_.chunks() * weights_.chunk_bytes() + weights_.blocks * sizeof(float);
    const size_t bytes = weights_.columns * column_bytes * rows;
    const size_t tiles = (weights_.columns + kernels_.tile - 1) / kernels_.tile;
    const size_t piece = (tiles + kPieces - 1) / kPieces;  // tiles
    parallel(context, (tiles + piece - 1) / piece, bytes, [&](size_t index) {
      const size_t begin = index * piece, end = std::min(begin + piece, tiles);
      if (rows == 1) {
        return kernels_.multiply_row(weights_, activations, begin * kernels_.tile, std::min(end * kernels_.tile, weights_.columns), written);
      }
      for (size_t tile = begin; tile < end; ++tile) {
        kernels_.multiply_rows(weights_, activations, rows, tile * kernels_.tile, std::min(tile + 1, end - 1) * kernels_.tile, written);
      }
    });
  }

  // work(0 … total - 1), on the session's threads where there are bytes enough.
  template <typename Work>
  void parallel(OrtKernelContext* context, size_t total, size_t bytes, const Work& work) const {
    if (total == 1 || bytes <= kAloneBytes) {
      for (size_t index = 0; index < total; ++index) work(index);
      return;
    }
    const auto call = [](void* data, size_t index) { (*static_cast<const Work*>(data))(index); };
    check(api_.parallel_for(context, call, total, 0, const_cast<Work*>(&work)));
  }

  [[noreturn]] void refuse(const char* reason) const {
    throw Failure{api_.error(kInvalidArgument, (std::string("edgelora's MatMulNBits: ") + reason).c_str())};
  }

  Api api_;
  const Kernels& kernels_;
  Weights weights_{};
};

// Nothing is thrown into onnxruntime.
template <typename Work>
OrtStatus* guard(const Api& api, const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::bad_alloc&) {
    return api.error(kFail, "edgelora's MatMulNBits: out of memory");
  } catch (const std::exception& error) {
    return api.error(kFail, error.what());
  }
}

struct Kernel {
  Api api;
  MatMulNBits product;
};

CustomOp describe_operator() {
  CustomOp described;
  described.name = [](const CustomOp*) { return "MatMulNBits"; };
  described.provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
  described.input_count = [](const CustomOp*) { return size_t{kInputs}; };
  described.input_type = [](const CustomOp*, size_t index) -> int {
    return index == kCodes ? kUint8 : index == kActivations || index == kScales ? kFloat : kAnyType;
  };
  described.input_presence = [](const CustomOp*, size_t index) -> int { return index > kScales ? kOptional : kRequired; };
  described.input_memory = [](const CustomOp*, size_t) { return 0; };
  described.output_count = [](const CustomOp*) { return size_t{1}; };
  described.output_type = [](const CustomOp*, size_t) -> int { return kFloat; };
  described.output_presence = [](const CustomOp*, size_t) -> int { return kRequired; };
  described.create = [](const CustomOp*, const void* functions, const OrtKernelInfo* info, void** kernel) {
    const Api api(functions);
    return guard(api, [&] { *kernel = new Kernel{api, MatMulNBits(api, info, *find_kernels())}; });
  };
  described.compute = [](void* kernel, OrtKernelContext* context) {
    const auto* made = static_cast<const Kernel*>(kernel);
    return guard(made->api, [&] { made->product.compute(context); });
  };
  described.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return described;
}

}  // namespace
}  // namespace edgelora

#if defined(_WIN32)
#define EDGELORA_EXPORT extern "C" __declspec(dllexport)
#else
#define EDGELORA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Which kernels this machine gets; null where there are none for it, and then the library must not be registered.
EDGELORA_EXPORT const char* edgelora_kernels() {
  const edgelora::Kernels* kernels = edgelora::find_kernels();
  return kernels ? kernels->name : nullptr;
}

// onnxruntime's entry point (SessionOptions.register_custom_ops_library).
EDGELORA_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const edgelora::ApiBase* base) {
  using namespace edgelora;
  static const CustomOp matmul = describe_operator();
  const void* functions = base->get_api(kApiVersion);
  if (functions == nullptr) std::abort();  // older than 1.17: there is no way to say so
  const Api api(functions);
  if (find_kernels() == nullptr) return api.error(kFail, "edgelora has no kernels for this machine's instruction set");
  return guard(api, [&] {
    OrtCustomOpDomain* domain = nullptr;  // never released: sessions made of these options go on using it
    check(api.make_domain("com.microsoft", &domain));
    check(api.add_operator(domain, &matmul));
    check(api.add_domain(options, domain));
  });
}
