// The tile library: everything a kernel includes.
#pragma once

#include "tk/accurate_tanh.cuh"
#include "tk/backend.cuh"
#include "tk/base.cuh"
#include "tk/block.cuh"
#include "tk/elementwise.cuh"
#include "tk/global_view.cuh"
#include "tk/grid/scheduler.cuh"
#include "tk/mask.cuh"
#include "tk/pipeline.cuh"
#include "tk/reductions.cuh"
#include "tk/shared_tile.cuh"
#include "tk/softplus.cuh"
