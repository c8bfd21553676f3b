// libacl_op_compiler: single operators. Settings are taken and forgotten; operators are refused by their names, but for
// the few that torch_npu launches by itself on the way of a collective: it pads what is gathered, and widens small types.
#include <cstring>
#include <vector>

#include "runtime.h"

using namespace host_cann;

namespace {

struct Description {
  int type;
  std::vector<int64_t> dims;
  bool host = false;  // its bytes are the host's, and may be gone after the call
};

struct Buffer {
  void* data;
  size_t size;
};

// An input as a task reads it: described, and its bytes, copied where they may go.
struct Input {
  Description about;
  Buffer buffer;
  std::vector<char> copied;

  const char* bytes() const { return about.host ? copied.data() : static_cast<const char*>(buffer.data); }
  int64_t integer(size_t index) const {  // of a list of int32 or int64
    return about.type == 9 ? reinterpret_cast<const int64_t*>(bytes())[index]
                           : reinterpret_cast<const int32_t*>(bytes())[index];
  }
};

struct Operator {
  std::vector<Input> in;
  Description about;  // of the only output
  Buffer out;
};

size_t size_of(int type) {  // of an element, by the numbers of the interface; 0 for types that nobody fills
  static const size_t sizes[] = {4, 2, 1, 4, 1, 0, 2, 2, 4, 8, 8, 8, 1};
  if (type == 27) return 2;  // bfloat16
  return type >= 0 && type < 13 ? sizes[type] : 0;
}

size_t elements(const std::vector<int64_t>& dims) {
  size_t count = 1;
  for (int64_t size : dims) count *= static_cast<size_t>(size);
  return count;
}

// The second input, one element, in every place of the output.
void fill(const Operator& op) {
  const size_t unit = size_of(op.about.type);
  for (size_t at = 0; at < elements(op.about.dims) * unit; at += unit) {
    std::memcpy(static_cast<char*>(op.out.data) + at, op.in[1].bytes(), unit);
  }
}

// The first input inside a frame: the second has the width before and after each dimension, the third its value.
void pad(const Operator& op) {
  const size_t unit = size_of(op.about.type), rank = op.about.dims.size();
  const auto& inner = op.in[0].about.dims;
  auto* out = static_cast<char*>(op.out.data);
  for (size_t at = 0; at < elements(op.about.dims); ++at) {
    size_t rest = at, from = 0, stride = 1;
    bool inside = true;
    for (size_t dim = rank; dim-- > 0;) {
      const auto width = static_cast<size_t>(op.about.dims[dim]);
      const auto index = static_cast<int64_t>(rest % width) - op.in[1].integer(2 * dim);
      rest /= width;
      inside = inside && index >= 0 && index < inner[dim];
      from += static_cast<size_t>(index) * stride;
      stride *= static_cast<size_t>(inner[dim]);
    }
    std::memcpy(out + at * unit, inside ? op.in[0].bytes() + from * unit : op.in[2].bytes(), unit);
  }
}

template <class From, class To>
void cast_to(const char* in, char* out, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    From value;
    std::memcpy(&value, in + i * sizeof(From), sizeof(From));
    const To made = static_cast<To>(value);
    std::memcpy(out + i * sizeof(To), &made, sizeof(To));
  }
}

template <class From>
void (*cast_from(int type))(const char*, char*, size_t) {
  switch (type) {
    case 0: return cast_to<From, float>;
    case 2: return cast_to<From, int8_t>;
    case 3: return cast_to<From, int32_t>;
    case 4: return cast_to<From, uint8_t>;
    case 9: return cast_to<From, int64_t>;
    case 12: return cast_to<From, bool>;
    default: return nullptr;
  }
}

// Between the types that collectives are widened from and to.
void (*caster(int from, int to))(const char*, char*, size_t) {
  switch (from) {
    case 0: return cast_from<float>(to);
    case 2: return cast_from<int8_t>(to);
    case 3: return cast_from<int32_t>(to);
    case 4: return cast_from<uint8_t>(to);
    case 9: return cast_from<int64_t>(to);
    case 12: return cast_from<bool>(to);
    default: return nullptr;
  }
}

void cast(const Operator& op) {
  caster(op.in[0].about.type, op.about.type)(op.in[0].bytes(), static_cast<char*>(op.out.data), elements(op.about.dims));
}

// What computes an operator here, or null.
void (*known(const std::string& name, const Operator& op))(const Operator&) {
  if (size_of(op.about.type) == 0) return nullptr;
  if (name == "Fill" && op.in.size() == 2) return fill;
  if (name == "PadV3" && op.in.size() == 3 && op.in[0].about.dims.size() == op.about.dims.size()) return pad;
  if (name == "Cast" && op.in.size() == 1 && caster(op.in[0].about.type, op.about.type)) return cast;
  return nullptr;
}

// These can be made to fail, by the names of the operators that are computed here.
__attribute__((constructor)) void know_operators() {
  static const Entry entries[] = {{"aclopCast", false}, {"aclopFill", false}, {"aclopPadV3", false}};
  know(std::begin(entries), std::end(entries));
}

Error run(const char* name, int inputs, const void* const* descriptions, const void* const* in, int outputs,
          const void* const* described, const void* const* out, void* stream) {
  const std::string operation = name ? name : "?";
  if (Error code = called(("aclop" + operation).c_str()).code) return code;
  Operator op{};
  for (int i = 0; i < inputs; ++i) {
    Input input{*static_cast<const Description*>(descriptions[i]), *static_cast<const Buffer*>(in[i]), {}};
    if (input.about.host) {
      const auto* from = static_cast<const char*>(input.buffer.data);
      input.copied.assign(from, from + input.buffer.size);
    }
    op.in.push_back(std::move(input));
  }
  if (outputs == 1) {
    op.about = *static_cast<const Description*>(described[0]);
    op.out = *static_cast<const Buffer*>(out[0]);
    if (auto compute = known(operation, op)) {
      return enqueue(stream, [op, compute](Error prior) {
        if (!prior) compute(op);
        return prior;
      });
    }
  }
  // The call fails, and its stream with it: torch_npu tells of a failed launch once, and what comes after it on the
  // stream would go on with numbers that nobody computed.
  const Error code = refuse(("operator " + operation).c_str());
  enqueue(stream, [code](Error prior) { return prior ? prior : code; });
  return code;
}

}  // namespace

EXPORT Error aclopCompileAndExecute(const char* operation, int inputs, const void* const* descriptions,
                                    const void* const* in, int outputs, const void* const* described, void* const* out,
                                    const void*, int, int, const char*, void* stream) {
  return run(operation, inputs, descriptions, in, outputs, described, out, stream);
}
EXPORT Error aclopCompileAndExecuteV2(const char* operation, int inputs, void** descriptions, void** in, int outputs,
                                      void** described, void** out, void*, int, int, const char*, void* stream) {
  return run(operation, inputs, descriptions, in, outputs, described, out, stream);
}
EXPORT Error aclGenGraphAndDumpForOp() { return refuse(__func__); }
EXPORT Error aclopStartDumpArgs(uint32_t, const char*) { return refuse(__func__); }
EXPORT Error aclopStopDumpArgs(uint32_t) { return refuse(__func__); }

EXPORT Error aclSetCompileopt(int, const char*) { return SUCCESS; }
EXPORT size_t aclGetCompileoptSize(int) { return 256; }
EXPORT Error aclGetCompileopt(int, char* value, size_t size) {
  if (size > 0) value[0] = 0;
  return SUCCESS;
}

EXPORT void* aclCreateTensorDesc(int type, int count, const int64_t* dims, int) {
  return new Description{type, std::vector<int64_t>(dims, dims + count), false};
}
EXPORT void aclDestroyTensorDesc(const void* its) { delete static_cast<const Description*>(its); }
EXPORT int aclGetTensorDescType(const void* its) { return static_cast<const Description*>(its)->type; }
EXPORT int aclGetTensorDescFormat(const void*) { return 2; }  // ND: plain order
EXPORT size_t aclGetTensorDescNumDims(const void* its) { return static_cast<const Description*>(its)->dims.size(); }
EXPORT Error aclGetTensorDescDimV2(const void* its, size_t index, int64_t* size) {
  const auto& dims = static_cast<const Description*>(its)->dims;
  if (index >= dims.size()) return fail(INVALID_PARAM, "host_cann: a tensor has no such dimension");
  *size = dims[index];
  return SUCCESS;
}
EXPORT void aclSetTensorDescName(void*, const char*) {}
EXPORT Error aclSetTensorFormat(void*, int) { return SUCCESS; }
EXPORT Error aclSetTensorShape(void*, int, const int64_t*) { return SUCCESS; }
EXPORT Error aclSetTensorPlaceMent(void* its, int place) {
  static_cast<Description*>(its)->host = place != 0;
  return SUCCESS;
}
EXPORT void* aclCreateDataBuffer(void* data, size_t size) { return new Buffer{data, size}; }
EXPORT Error aclDestroyDataBuffer(const void* its) {
  delete static_cast<const Buffer*>(its);
  return SUCCESS;
}

static char attributes;
EXPORT void* aclopCreateAttr() { return &attributes; }
EXPORT void aclopDestroyAttr(const void*) {}
#define ATTRIBUTE(kind) \
  EXPORT Error aclopSetAttr##kind() { return SUCCESS; }
ATTRIBUTE(Bool)
ATTRIBUTE(DataType)
ATTRIBUTE(Float)
ATTRIBUTE(Int)
ATTRIBUTE(String)
ATTRIBUTE(ListBool)
ATTRIBUTE(ListFloat)
ATTRIBUTE(ListInt)
ATTRIBUTE(ListListInt)
