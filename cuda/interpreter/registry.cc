#include "interpreter/registry.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace tk::interpreter {
namespace {

std::vector<Specialisation>& all() {
  static std::vector<Specialisation> specialisations;
  return specialisations;
}

}  // namespace

Registration::Registration(std::string function, void (*run)(const void* params)) {
  all().push_back({std::move(function), run});
}

const Specialisation* find_specialisation(const std::string& function) {
  const auto found = std::find_if(all().begin(), all().end(), [&](const Specialisation& known) {
    return known.function == function;
  });
  return found == all().end() ? nullptr : &*found;
}

}  // namespace tk::interpreter
