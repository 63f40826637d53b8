// What runs a kernel: the GPU (sm90), or the interpreter, which checks it on a CPU.
//
// Both define the same names with the same meaning. Everything beside the two folders is built on
// them and is the same for both.
#pragma once

#ifdef TK_INTERPRETER
#include "tk/interpreter/barrier.h"
#include "tk/interpreter/bits.h"
#include "tk/interpreter/copy.h"
#include "tk/interpreter/map.h"
#include "tk/interpreter/mma.h"
#include "tk/interpreter/products.h"
#include "tk/interpreter/reduce.h"
#include "tk/interpreter/register_tile.h"
#include "tk/interpreter/roles.h"
#include "tk/interpreter/runs.h"
#include "tk/interpreter/tma.h"
#include "tk/interpreter/triangle.h"
#else
#include "tk/sm90/barrier.cuh"
#include "tk/sm90/bits.cuh"
#include "tk/sm90/copy.cuh"
#include "tk/sm90/elements.cuh"
#include "tk/sm90/fragments.cuh"
#include "tk/sm90/map.cuh"
#include "tk/sm90/mma.cuh"
#include "tk/sm90/products.cuh"
#include "tk/sm90/reduce.cuh"
#include "tk/sm90/register_tile.cuh"
#include "tk/sm90/roles.cuh"
#include "tk/sm90/runs.cuh"
#include "tk/sm90/tma.cuh"
#include "tk/sm90/triangle.cuh"
#include "tk/sm90/zip.cuh"
#endif
