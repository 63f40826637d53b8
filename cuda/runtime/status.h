// What went wrong, as a value: the runtime throws nothing.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace tk::runtime {

enum class ErrorKind {
  kInvalidArgument,     // the call is wrong
  kUnsupported,         // the call is right, this machine or this version cannot do it
  kFailedPrecondition,  // something is missing that the user can install or set
  kInternal,            // a bug of ours, or the driver failed
};

struct Error {
  ErrorKind kind;
  std::string message;
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Error error) : error_(std::move(error)) {}

  bool ok() const { return !error_.has_value(); }
  const Error& error() const { return *error_; }

 private:
  std::optional<Error> error_;
};

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}
  Result(Error error) : state_(std::move(error)) {}

  bool ok() const { return std::holds_alternative<T>(state_); }
  const Error& error() const { return std::get<Error>(state_); }
  T& operator*() { return std::get<T>(state_); }
  const T& operator*() const { return std::get<T>(state_); }
  T* operator->() { return &std::get<T>(state_); }
  const T* operator->() const { return &std::get<T>(state_); }

 private:
  std::variant<T, Error> state_;
};

}  // namespace tk::runtime
