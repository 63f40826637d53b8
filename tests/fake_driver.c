/* A stand-in for libcuda.so.1 that runs nothing and writes down what it is asked to do.
 *
 * Opened through TK_JAX_LIBCUDA. FAKE_LOG names the file that calls are added to, one JSON object
 * a line; FAKE_CAPABILITY ("9.0") and FAKE_MULTIPROCESSORS (132) describe its one device; and
 * FAKE_FAILURE ("cuLaunchKernelEx") names the function that fails.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value != NULL ? value : otherwise;
}

static int fails(const char* function) {
  return strcmp(setting("FAKE_FAILURE", ""), function) == 0 ? 719 : 0;
}

static FILE* log_file(void) { return fopen(setting("FAKE_LOG", "/dev/null"), "a"); }

static void list(FILE* out, const char* name, int count, const uint64_t* wide,
                 const uint32_t* narrow) {
  fprintf(out, ", \"%s\": [", name);
  for (int i = 0; i < count; ++i) {
    unsigned long long value = wide != NULL ? wide[i] : narrow[i];
    fprintf(out, "%s%llu", i > 0 ? ", " : "", value);
  }
  fprintf(out, "]");
}

int cuInit(unsigned flags) {
  (void)flags;
  return fails("cuInit");
}
int cuGetErrorName(int code, const char** name) {
  *name = code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : NULL;
  return 0;
}
int cuGetErrorString(int code, const char** text) {
  *text = code == 719 ? "unspecified launch failure" : NULL;
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? 0 : 101;
}
int cuDeviceGetName(char* name, int size, int device) {
  (void)device;
  snprintf(name, (size_t)size, "Fake GPU");
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  const char* capability = setting("FAKE_CAPABILITY", "9.0");
  if (attribute == 75) *value = atoi(capability);
  if (attribute == 76) *value = atoi(strchr(capability, '.') + 1);
  if (attribute == 16) *value = atoi(setting("FAKE_MULTIPROCESSORS", "132"));
  return fails("cuDeviceGetAttribute");
}

static void* current_context;
static void* previous_context;
static char primary_context;

int cuDevicePrimaryCtxRetain(void** context, int device) {
  (void)device;
  *context = &primary_context;
  return fails("cuDevicePrimaryCtxRetain");
}
int cuCtxGetCurrent(void** context) {
  *context = current_context;
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  previous_context = current_context;
  current_context = context;
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  *context = current_context;
  current_context = previous_context;
  return 0;
}

int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options,
                       void** values) {
  (void)count;
  (void)options;
  (void)values;
  *module = (void*)image;
  if (current_context != &primary_context) return 201;
  return memcmp(image, "\177ELF", 4) == 0 ? fails("cuModuleLoadDataEx") : 200;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module;
  *function = strdup(name);
  return fails("cuModuleGetFunction");
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  FILE* out = log_file();
  fprintf(out, "{\"call\": \"attribute\", \"symbol\": \"%s\", \"id\": %d, \"value\": %d}\n",
          (const char*)function, attribute, value);
  fclose(out);
  return fails("cuFuncSetAttribute");
}
int cuFuncLoad(void* function) {
  (void)function;
  return fails("cuFuncLoad");
}

struct Attribute {
  int id;
  char padding[4];
  unsigned value[16];
};
struct Config {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  struct Attribute* attributes;
  unsigned num_attributes;
};

int cuLaunchKernelEx(const struct Config* config, void* function, void** params, void** extra) {
  FILE* out = log_file();
  fprintf(out, "{\"call\": \"launch\", \"symbol\": \"%s\"", (const char*)function);
  list(out, "grid", 3, NULL, config->grid);
  list(out, "block", 3, NULL, config->block);
  fprintf(out, ", \"shared_bytes\": %u, \"stream\": %llu", config->shared_bytes,
          (unsigned long long)(uintptr_t)config->stream);
  if (config->num_attributes == 1 && config->attributes[0].id == 4) {
    list(out, "cluster", 3, NULL, config->attributes[0].value);
  }
  fprintf(out, ", \"context\": %s}\n", current_context == &primary_context ? "true" : "false");
  fclose(out);
  return params[0] != NULL && extra == NULL ? fails("cuLaunchKernelEx") : 1;
}

int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                           int interleave, int swizzle, int promotion, int fill) {
  (void)steps;
  (void)promotion;
  FILE* out = log_file();
  fprintf(out, "{\"call\": \"map\", \"type\": %d, \"address\": %llu, \"swizzle\": %d", type,
          (unsigned long long)(uintptr_t)address, swizzle);
  list(out, "dims", (int)rank, dims, NULL);
  list(out, "strides", (int)rank - 1, strides, NULL);
  list(out, "box", (int)rank, NULL, box);
  fprintf(out, "}\n");
  fclose(out);
  memset(map, 0xab, 128);
  return interleave == 0 && fill == 0 ? fails("cuTensorMapEncodeTiled") : 1;
}
