/* A stand-in for libnvrtc.so.13 that compiles whatever it is given to an ELF file's first
 * bytes and the name of its source.
 *
 * Opened through TK_JAX_NVRTC, by tests of what is done with all kernels once they are compiled.
 */
#include <stdlib.h>
#include <string.h>

typedef struct {
  char* name;
} Program;

static const char kMagic[4] = {'\177', 'E', 'L', 'F'};

const char* nvrtcGetErrorString(int code) { return code == 0 ? "no error" : "an error"; }

int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return 0;
}

int nvrtcCreateProgram(Program** program, const char* source, const char* name, int num_headers,
                       const char* const* headers, const char* const* include_names) {
  *program = malloc(sizeof(Program));
  (*program)->name = strdup(name);
  return 0;
}

int nvrtcDestroyProgram(Program** program) {
  free((*program)->name);
  free(*program);
  *program = NULL;
  return 0;
}

int nvrtcCompileProgram(Program* program, int count, const char* const* options) { return 0; }

int nvrtcGetCUBINSize(Program* program, size_t* size) {
  *size = sizeof(kMagic) + strlen(program->name);
  return 0;
}

int nvrtcGetCUBIN(Program* program, char* cubin) {
  memcpy(cubin, kMagic, sizeof(kMagic));
  memcpy(cubin + sizeof(kMagic), program->name, strlen(program->name));
  return 0;
}

int nvrtcGetProgramLogSize(Program* program, size_t* size) {
  *size = 1;
  return 0;
}

int nvrtcGetProgramLog(Program* program, char* log) {
  *log = '\0';
  return 0;
}
