#include "interpreter/registry.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <utility>

namespace tk::interpreter {
namespace {

struct Specialisation {
  SpecialisationName name;
  RunKernel run;
};

struct Registry {
  std::mutex mutex;
  std::deque<Specialisation> all;
};

Registry& registry() {
  static Registry known;
  return known;
}

}  // namespace

RunKernel find_specialisation(const SpecialisationName& name) {
  std::lock_guard lock(registry().mutex);
  for (const Specialisation& known : registry().all) {
    if (known.name == name) return known.run;
  }
  return nullptr;
}

void register_specialisation(SpecialisationName name, RunKernel run) {
  if (find_specialisation(name) != nullptr) return;
  std::lock_guard lock(registry().mutex);
  registry().all.push_back({std::move(name), run});
}

}  // namespace tk::interpreter
