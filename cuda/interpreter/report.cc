#include "interpreter/report.h"

#include <string_view>

namespace tk::interpreter {

const char* fault_name(FaultKind kind) {
  switch (kind) {
    case FaultKind::kBusyRegisters:
      return "busy-registers";
    case FaultKind::kUndefinedRegisters:
      return "undefined-registers";
    case FaultKind::kUnfinishedVector:
      return "unfinished-vector";
    case FaultKind::kSharedUnwritten:
      return "shared-unwritten";
    case FaultKind::kSharedReadEarly:
      return "shared-read-early";
    case FaultKind::kSharedOverwritten:
      return "shared-overwritten";
    case FaultKind::kMissingFence:
      return "missing-fence";
    case FaultKind::kBarrier:
      return "barrier";
    case FaultKind::kNamedBarrier:
      return "named-barrier";
    case FaultKind::kDeadlock:
      return "deadlock";
    case FaultKind::kOutOfBounds:
      return "out-of-bounds";
    case FaultKind::kGlobalUnwritten:
      return "global-unwritten";
    case FaultKind::kGlobalRace:
      return "global-race";
    case FaultKind::kLostWrite:
      return "lost-write";
    case FaultKind::kInFlightAtExit:
      return "in-flight-at-exit";
    case FaultKind::kTensorMap:
      return "tensor-map";
    case FaultKind::kLanes:
      return "lanes";
    case FaultKind::kBudget:
      return "budget";
  }
  return "unknown";
}

std::string text(Location at) {
  std::string_view file = at.file;
  for (const std::string_view root : {"kernels/", "include/tk/"}) {
    if (const auto place = file.rfind(root); place != std::string_view::npos) {
      file.remove_prefix(place);
      break;
    }
  }
  return std::string(file) + ":" + std::to_string(at.line);
}

std::string Report::text() const {
  return where + ": " + fault_name(kind) + " in " + kernel + ", " + who + ": " + message +
         " (seed " + std::to_string(seed) + ")";
}

}  // namespace tk::interpreter
