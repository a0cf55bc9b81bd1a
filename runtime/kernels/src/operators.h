// The common base of the operators: calls to onnxruntime, and sharing work among a session's threads.
#pragma once

#include <array>
#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"
#include "onnxruntime_abi.h"

namespace edgelora {

const CustomOp& matmul_nbits();
const CustomOp& group_query_attention();
const std::vector<CustomOp>& own_operators();  // those of the domain "edgelora"

struct Failure {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) throw Failure{status};
}

// Turns exceptions into a status, since none must reach onnxruntime.
template <typename Work>
OrtStatus* guard(const Api& api, const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::bad_alloc&) {
    return api.error(kFail, "edgelora's kernels: out of memory");
  } catch (const std::exception& error) {
    return api.error(kFail, error.what());
  }
}

struct Shape {
  std::vector<int64_t> sizes;
  int type;
};

inline Shape describe(const Api& api, const OrtValue* tensor) {
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

// The number of pieces that `size` is cut into; the last one may be smaller.
constexpr size_t count_pieces(size_t size, size_t piece) { return (size + piece - 1) / piece; }

// An operator at one node of a graph.
class Operator {
 public:
  Operator(const Api& api, const OrtKernelInfo* info, const char* name) : api_(api), name_(name) {
    check(api_.count_inputs(info, &inputs_));
  }

  [[noreturn]] void refuse(const std::string& reason) const {
    throw Failure{api_.error(kInvalidArgument, ("edgelora's " + std::string(name_) + ": " + reason).c_str())};
  }
  template <typename Value>
  Value attribute(const OrtKernelInfo* info, const char* name, Value otherwise) const {
    Value value = otherwise;
    if (OrtStatus* status = api_.attribute(info, name, &value)) {
      api_.release(status);
      return otherwise;
    }
    return value;
  }
  // An input; null if the graph leaves it out.
  const OrtValue* input(const OrtKernelContext* context, size_t index) const {
    const OrtValue* value = nullptr;
    if (index < inputs_) check(api_.input(context, index, &value));
    return value;
  }
  template <typename Value>
  const Value* read(const OrtValue* tensor) const {
    return static_cast<const Value*>(data(tensor));
  }
  float* make_output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& sizes) const {
    OrtValue* output = nullptr;
    check(api_.output(context, index, sizes.data(), sizes.size(), &output));
    return static_cast<float*>(data(output));
  }
  // Calls work(0 … total - 1), on the session's threads if it reads enough bytes.
  template <typename Work>
  void parallel(OrtKernelContext* context, size_t total, size_t bytes, const Work& work) const {
    if (total == 1 || bytes <= kSerialBytes) {
      for (size_t index = 0; index < total; ++index) work(index);
      return;
    }
    struct Shared {
      const Work& work;
      std::atomic<bool> failed{false};
    } shared{work};
    const auto call = [](void* data, size_t index) {
      auto& known = *static_cast<Shared*>(data);
      try {
        known.work(index);
      } catch (...) {  // work only computes and allocates, so this is a bad_alloc
        known.failed = true;
      }
    };
    check(api_.parallel_for(context, call, total, 0, &shared));
    if (shared.failed) throw std::bad_alloc();
  }

  Api api_;
  size_t inputs_ = 0;  // of the node, including those left out in between

 private:
  static constexpr size_t kSerialBytes = 32 << 10;  // too few to wake a thread for

  void* data(const OrtValue* tensor) const {
    void* data = nullptr;
    check(api_.data(tensor, &data));
    return data;
  }

  const char* name_;
};

// Sets the functions by which onnxruntime creates, runs and destroys an Operator.
template <typename Implementation>
void describe_lifecycle(CustomOp& described) {
  struct Kernel {
    Api api;
    Implementation implementation;
  };
  described.create = [](const CustomOp*, const void* functions, const OrtKernelInfo* info, void** kernel) {
    const Api api(functions);
    return guard(api, [&] { *kernel = new Kernel{api, Implementation(api, info, *find_kernels())}; });
  };
  described.compute = [](void* kernel, OrtKernelContext* context) {
    const auto* known = static_cast<const Kernel*>(kernel);
    return guard(known->api, [&] { known->implementation.compute(context); });
  };
  described.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  described.provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
  described.input_memory = [](const CustomOp*, size_t) { return 0; };
  described.output_type = [](const CustomOp*, size_t) -> int { return kFloat; };
  described.output_presence = [](const CustomOp*, size_t) -> int { return kRequired; };
}

}  // namespace edgelora
