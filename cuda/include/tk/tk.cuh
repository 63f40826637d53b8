// The tile library: everything a kernel includes.
#pragma once

#include "tk/base.cuh"
#include "tk/grid/scheduler.cuh"
#include "tk/sm90/barrier.cuh"
#include "tk/sm90/block.cuh"
#include "tk/sm90/copy.cuh"
#include "tk/sm90/global_view.cuh"
#include "tk/sm90/map.cuh"
#include "tk/sm90/mask.cuh"
#include "tk/sm90/mma.cuh"
#include "tk/sm90/pipeline.cuh"
#include "tk/sm90/reduce.cuh"
#include "tk/sm90/register_tile.cuh"
#include "tk/sm90/shared_tile.cuh"
#include "tk/sm90/tma.cuh"
