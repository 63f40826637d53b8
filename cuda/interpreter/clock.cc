#include "interpreter/clock.h"

namespace tk::interpreter {
namespace {

// Whether `a` knows all that `b` knows.
bool covers(const Counts& a, const Counts& b) {
  for (std::size_t i = 0; i < b.size(); ++i) {
    if (b[i] > (i < a.size() ? a[i] : 0)) return false;
  }
  return true;
}

bool covers(const OtherClusters& a, const OtherClusters& b) {
  return std::all_of(b.begin(), b.end(), [&](const auto& entry) {
    const auto known = a.find(entry.first);
    return known != a.end() &&
           (known->second == entry.second || covers(*known->second, *entry.second));
  });
}

}  // namespace

// One of the two where it says it all, so that those who talk often end up with the same object.
std::shared_ptr<const OtherClusters> VectorClock::merged(
    const std::shared_ptr<const OtherClusters>& a, const std::shared_ptr<const OtherClusters>& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  if (covers(*a, *b)) return a;
  if (covers(*b, *a)) return b;
  auto both = std::make_shared<OtherClusters>(*a);
  for (const auto& [cluster, counts] : *b) {
    auto& mine = (*both)[cluster];
    if (!mine || covers(*counts, *mine)) {
      mine = counts;
    } else if (!covers(*mine, *counts)) {
      auto joint = std::make_shared<Counts>(std::max(mine->size(), counts->size()), 0);
      for (std::size_t i = 0; i < joint->size(); ++i) {
        (*joint)[i] =
            std::max(i < mine->size() ? (*mine)[i] : 0, i < counts->size() ? (*counts)[i] : 0);
      }
      mine = joint;
    }
  }
  return both;
}

}  // namespace tk::interpreter
