/* Streams, events, waits of the host, and graphs captured from a stream. */
#include "pretend.h"
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct graph {
  struct kernel **launches;
  long length, room;
  enum cudaStreamCaptureMode mode;
  pthread_t owner;
  int open, spoiled;
};
struct stream { struct graph *graph; struct stream *next; };
struct event { struct graph *graph; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stream first_stream, *all_streams = &first_stream;
static struct graph *open_graph; /* PyTorch captures one at a time */
static __thread enum cudaStreamCaptureMode mode_of_thread;

void *new_handle(void) { return calloc(1, 64); }
static struct stream *stream_of(const void *handle) { return (uintptr_t)handle < 4096 ? &first_stream : (struct stream *)handle; }
struct graph *capturing(const void *stream) { return stream_of(stream)->graph; }

void keep_launch(struct graph *graph, struct kernel *kernel) {
  pthread_mutex_lock(&lock);
  if (graph->length == graph->room) {
    graph->room = graph->room ? 2 * graph->room : 256;
    graph->launches = realloc(graph->launches, graph->room * sizeof *graph->launches);
  }
  graph->launches[graph->length++] = kernel;
  pthread_mutex_unlock(&lock);
}

/* source: CUDA runtime API, cudaThreadExchangeStreamCaptureMode: which threads may not allocate or wait meanwhile. */
cudaError_t unsafe_while_capturing(void) {
  struct graph *graph = open_graph;
  if (!graph || graph->mode == cudaStreamCaptureModeRelaxed || mode_of_thread == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  int mine = pthread_equal(graph->owner, pthread_self());
  if (!mine && (graph->mode == cudaStreamCaptureModeThreadLocal || mode_of_thread == cudaStreamCaptureModeThreadLocal)) return cudaSuccess;
  graph->spoiled = 1;
  return cudaErrorStreamCaptureUnsupported;
}

/* ---- waits: each is counted and told to whoever asked (answers.py writes down the line) ---- */

static void (*told)(void);
void pretend_tell_waits(void (*listener)(void)) { told = listener; }
static cudaError_t wait_for(const void *stream) {
  READY;
  if (capturing(stream)) { capturing(stream)->spoiled = 1; return failed(cudaErrorStreamCaptureUnsupported); }
  if (unsafe_while_capturing()) return failed(cudaErrorStreamCaptureUnsupported);
  count(WAITS, 1);
  if (told) told();
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for(stream); }
cudaError_t cudaDeviceSynchronize(void) { return wait_for(0); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait_for(0); }
CUresult cuStreamSynchronize(CUstream stream) { return (CUresult)wait_for(stream); }
CUresult cuCtxSynchronize(void) { return (CUresult)wait_for(0); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { READY; return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { READY; return cudaSuccess; }

/* ---- streams and events ---- */

static cudaError_t new_stream(cudaStream_t *stream) {
  READY;
  struct stream *made = new_handle();
  pthread_mutex_lock(&lock);
  made->next = all_streams;
  all_streams = made;
  pthread_mutex_unlock(&lock);
  *stream = (cudaStream_t)made;
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return new_stream(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return new_stream(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return new_stream(stream); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { READY; *priority = 0; return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { READY; *event = new_handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  READY;
  ((struct event *)event)->graph = capturing(stream);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  READY;
  struct graph *graph = ((struct event *)event)->graph;
  if (graph && graph->open) stream_of(stream)->graph = graph;
  return cudaSuccess;
}
/* No time passes on the card; a millisecond keeps divisions defined. */
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) { READY; *milliseconds = 1; return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) { READY; function(data); return cudaSuccess; }

/* ---- capture ---- */

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = mode_of_thread;
  mode_of_thread = *mode;
  *mode = before;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  READY;
  if (stream_of(stream) == &first_stream) return failed(cudaErrorStreamCaptureUnsupported);
  struct graph *graph = calloc(1, sizeof *graph);
  *graph = (struct graph){.mode = mode, .owner = pthread_self(), .open = 1};
  stream_of(stream)->graph = open_graph = graph;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  READY;
  struct graph *captured = capturing(stream);
  if (!captured) return failed(cudaErrorIllegalState);
  for (struct stream *each = all_streams; each; each = each->next)
    if (each->graph == captured) each->graph = NULL;
  captured->open = 0;
  open_graph = NULL;
  *graph = captured->spoiled ? NULL : (cudaGraph_t)captured;
  return captured->spoiled ? failed(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

static enum cudaStreamCaptureStatus status_of(const void *stream) {
  struct graph *graph = capturing(stream);
  return !graph ? cudaStreamCaptureStatusNone : graph->spoiled ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { READY; *status = status_of(stream); return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *num_nodes) {
  READY;
  *status = status_of(stream);
  if (id) *id = (unsigned long long)capturing(stream);
  if (graph) *graph = (cudaGraph_t)capturing(stream);
  if (num_nodes) *num_nodes = 0;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *num_nodes) {
  *num_nodes = ((struct graph *)graph)->length;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  READY;
  struct graph *copy = calloc(1, sizeof *copy), *from = (struct graph *)graph;
  copy->length = from->length;
  copy->launches = malloc(from->length * sizeof *copy->launches);
  memcpy(copy->launches, from->launches, from->length * sizeof *copy->launches);
  *executable = (cudaGraphExec_t)copy;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) { return cudaGraphInstantiateWithFlags(executable, graph, flags); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  READY;
  struct graph *graph = (struct graph *)executable;
  count(GRAPHS, 1);
  count(IN_GRAPHS, graph->length);
  for (long i = 0; i < graph->length; i++) repeat_kernel(graph->launches[i]);
  return cudaSuccess;
}
static cudaError_t forget_graph(void *graph) {
  if (graph) free(((struct graph *)graph)->launches);
  free(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return forget_graph(graph); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return forget_graph(executable); }
