/* A driver's management library for a machine without one: pynvml loads it as the real libnvidia-ml.so.1.
 * What it answers comes from the environment, so that each test is a process of its own. What is not here, the real
 * pynvml reports as not found. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define OK 0
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7

typedef struct {
    unsigned int pid;
    unsigned long long used;
    unsigned int instance, compute;
} process_t; /* nvmlProcessInfo_t of nvml.h, version 3 */

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static int text(char *out, const char *said) {
    strcpy(out, said);
    return OK;
}

static int device;

int nvmlInitWithFlags(unsigned int flags) { return OK; }
int nvmlShutdown(void) { return OK; }
int nvmlSystemGetDriverVersion(char *out, unsigned int size) { return text(out, "580.159.03"); }
int nvmlDeviceGetCount_v2(unsigned int *out) { *out = 1; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **out) { *out = &device; return OK; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    *out = &device;
    return strcmp(uuid, "GPU-1234") ? NOT_FOUND : OK;
}
int nvmlDeviceGetUUID(void *gpu, char *out, unsigned int size) { return text(out, "GPU-1234"); }
int nvmlDeviceGetName(void *gpu, char *out, unsigned int size) { return text(out, "NVIDIA H200"); }
int nvmlDeviceGetEnforcedPowerLimit(void *gpu, unsigned int *out) { *out = number("LIMIT_MW", 700000); return OK; }
int nvmlDeviceGetPowerManagementDefaultLimit(void *gpu, unsigned int *out) { *out = 700000; return OK; }
int nvmlDeviceGetPersistenceMode(void *gpu, unsigned int *out) { *out = number("PERSISTENT", 1); return OK; }
int nvmlDeviceGetClockInfo(void *gpu, unsigned int type, unsigned int *out) { *out = type == 1 ? 1755 : 1; return OK; }
int nvmlDeviceGetMaxClockInfo(void *gpu, unsigned int type, unsigned int *out) { *out = 1980; return OK; }
int nvmlDeviceGetTemperature(void *gpu, unsigned int sensor, unsigned int *out) {
    *out = 61;
    return sensor == 0 ? OK : NOT_SUPPORTED;
}
int nvmlDeviceIsMigDeviceHandle(void *gpu, unsigned int *out) { *out = number("MIG", 0); return OK; }
int nvmlDeviceGetTotalEnergyConsumption(void *gpu, unsigned long long *out) {
    *out = number("ENERGY_MJ", 0);
    return getenv("ENERGY_MJ") ? OK : NOT_SUPPORTED;
}
#ifdef OLD
int nvmlDeviceGetCurrentClocksThrottleReasons(void *gpu, unsigned long long *out) {
#else
int nvmlDeviceGetCurrentClocksEventReasons(void *gpu, unsigned long long *out) {
#endif
    *out = number("REASONS", 0);
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *gpu, unsigned int *count, process_t *out) {
    unsigned int wanted = getenv("FOREIGN") ? 2 : 1;
    if (*count < wanted) {
        *count = wanted;
        return INSUFFICIENT_SIZE;
    }
    *count = wanted;
    out[0] = (process_t){getpid(), 512ULL << 20, 0, 0};
    if (wanted > 1)
        out[1] = (process_t){number("FOREIGN", 0), ~0ULL, 0, 0};
    return OK;
}
