// The part of onnxruntime's C interface that the operators use, so that building needs none of onnxruntime's headers.
//
// onnxruntime keeps this interface binary compatible: functions keep their position in OrtApi, and new ones are appended
// (https://onnxruntime.ai/docs/reference/compatibility.html). The positions are those of 1.17, the oldest version with all of
// them.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

namespace edgelora {

constexpr uint32_t kApiVersion = 17;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kAnyType = 0, kFloat = 1, kUint8 = 2, kInt32 = 6 };
enum Presence : int { kRequired = 0, kOptional = 1 };

// OrtApi as an array of functions, each called through the type that the C header declares.
class Api {
 public:
  explicit Api(const void* functions) : functions_(static_cast<void* const*>(functions)) {}

  OrtStatus* error(ErrorCode code, const char* message) const { return at<OrtStatus* (*)(int, const char*)>(0)(code, message); }
  OrtStatus* make_domain(const char* name, OrtCustomOpDomain** domain) const {
    return at<OrtStatus* (*)(const char*, OrtCustomOpDomain**)>(26)(name, domain);
  }
  OrtStatus* add_operator(OrtCustomOpDomain* domain, const void* custom_op) const {
    return at<OrtStatus* (*)(OrtCustomOpDomain*, const void*)>(27)(domain, custom_op);
  }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return at<OrtStatus* (*)(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }
  OrtStatus* data(const OrtValue* tensor, void** data) const {
    return at<OrtStatus* (*)(const OrtValue*, void**)>(51)(tensor, data);
  }
  OrtStatus* element_type(const OrtTensorTypeAndShapeInfo* info, int* type) const {
    return at<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int*)>(60)(info, type);
  }
  OrtStatus* count_axes(const OrtTensorTypeAndShapeInfo* info, size_t* count) const {
    return at<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, count);
  }
  OrtStatus* shape(const OrtTensorTypeAndShapeInfo* info, int64_t* sizes, size_t count) const {
    return at<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, sizes, count);
  }
  OrtStatus* describe(const OrtValue* tensor, OrtTensorTypeAndShapeInfo** info) const {
    return at<OrtStatus* (*)(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(tensor, info);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float* value) const {
    return at<OrtStatus* (*)(const OrtKernelInfo*, const char*, float*)>(85)(info, name, value);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* value) const {
    return at<OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, value);
  }
  OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** tensor) const {
    return at<OrtStatus* (*)(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, tensor);
  }
  OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t axes, OrtValue** tensor) const {
    return at<OrtStatus* (*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(context, index, sizes, axes,
                                                                                                 tensor);
  }
  void release(OrtStatus* status) const { at<void (*)(OrtStatus*)>(93)(status); }
  void release(OrtTensorTypeAndShapeInfo* info) const { at<void (*)(OrtTensorTypeAndShapeInfo*)>(99)(info); }
  OrtStatus* count_inputs(const OrtKernelInfo* info, size_t* count) const {
    return at<OrtStatus* (*)(const OrtKernelInfo*, size_t*)>(230)(info, count);
  }
  OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** tensor) const {
    return at<OrtStatus* (*)(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(249)(info, index, is_constant, tensor);
  }
  // Calls work(data, 0 … total - 1) on the session's threads, in at most `batches` batches unless that is 0.
  OrtStatus* parallel_for(const OrtKernelContext* context, void (*work)(void*, size_t), size_t total, size_t batches,
                          void* data) const {
    return at<OrtStatus* (*)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(context, work, total,
                                                                                                            batches, data);
  }

 private:
  template <typename Function>
  Function at(size_t place) const {
    return reinterpret_cast<Function>(functions_[place]);
  }

  void* const* functions_;
};

// OrtApiBase.
struct ApiBase {
  const void* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// OrtCustomOp of 1.17. A null field means the default.
struct CustomOp {
  uint32_t version = kApiVersion;
  void* (*create_v1)(const CustomOp*, const void*, const OrtKernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*provider)(const CustomOp*) = nullptr;
  int (*input_type)(const CustomOp*, size_t) = nullptr;
  size_t (*input_count)(const CustomOp*) = nullptr;
  int (*output_type)(const CustomOp*, size_t) = nullptr;
  size_t (*output_count)(const CustomOp*) = nullptr;
  void (*compute_v1)(void*, OrtKernelContext*) = nullptr;
  void (*destroy)(void*) = nullptr;
  int (*input_presence)(const CustomOp*, size_t) = nullptr;
  int (*output_presence)(const CustomOp*, size_t) = nullptr;
  int (*input_memory)(const CustomOp*, size_t) = nullptr;
  int (*variadic_input_least)(const CustomOp*) = nullptr;
  int (*variadic_input_alike)(const CustomOp*) = nullptr;
  int (*variadic_output_least)(const CustomOp*) = nullptr;
  int (*variadic_output_alike)(const CustomOp*) = nullptr;
  OrtStatus* (*create)(const CustomOp*, const void* api, const OrtKernelInfo*, void** kernel) = nullptr;
  OrtStatus* (*compute)(void* kernel, OrtKernelContext*) = nullptr;
  OrtStatus* (*infer_shape)(const CustomOp*, OrtShapeInferContext*) = nullptr;
  int (*start_version)(const CustomOp*) = nullptr;
  int (*end_version)(const CustomOp*) = nullptr;
};

}  // namespace edgelora
