// Which machine runs on this thread.
//
// In a file of its own: a compiler that saw both the variable and a function that suspends a fibre
// might keep the variable's address over the suspension, after which another thread goes on.
#include "interpreter/machine.h"

namespace tk::interpreter {
namespace {

thread_local Machine* current = nullptr;

}  // namespace

Machine& machine() { return *current; }
void set_machine(Machine* machine) { current = machine; }

}  // namespace tk::interpreter
