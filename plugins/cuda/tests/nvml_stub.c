/* The part of NVML that the probe calls, for tests: what it answers is in the environment.
   STUB_INIT, STUB_CUDA: codes and numbers; STUB_DRIVER; STUB_CARDS: "name|uuid|sm|mig;..." */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int field(int card, int column, char *into, unsigned size) {
    const char *at = getenv("STUB_CARDS");
    for (; at && card > 0; card--) at = (at = strchr(at, ';')) ? at + 1 : NULL;
    for (; at && column > 0; column--) at = (at = strchr(at, '|')) ? at + 1 : NULL;
    if (!at) return 6;
    snprintf(into, size, "%.*s", (int)strcspn(at, "|;"), at);
    return 0;
}

int nvmlInit_v2(void) { return number("STUB_INIT", 0); }
int nvmlShutdown(void) { return 0; }

int nvmlSystemGetDriverVersion(char *into, unsigned size) {
    snprintf(into, size, "%s", getenv("STUB_DRIVER") ? getenv("STUB_DRIVER") : "570.86.15");
    return 0;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = number("STUB_CUDA", 12080);
    return 0;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    const char *at = getenv("STUB_CARDS");
    for (*count = at && *at; at && (at = strchr(at, ';')); at++) ++*count;
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(size_t)(index + 1);
    return 0;
}

int nvmlDeviceGetName(void *card, char *into, unsigned size) {
    return field((int)(size_t)card - 1, 0, into, size);
}

int nvmlDeviceGetUUID(void *card, char *into, unsigned size) {
    return field((int)(size_t)card - 1, 1, into, size);
}

int nvmlDeviceGetCudaComputeCapability(void *card, int *major, int *minor) {
    char text[16];
    int code = field((int)(size_t)card - 1, 2, text, sizeof text);
    *major = atoi(text) / 10;
    *minor = atoi(text) % 10;
    return code;
}

int nvmlDeviceGetMigMode(void *card, unsigned *now, unsigned *pending) {
    char text[16];
    if (field((int)(size_t)card - 1, 3, text, sizeof text)) return 3;
    *now = *pending = (unsigned)atoi(text);
    return 0;
}
