/* The floor: what this machine needs at the least to bring the same bytes to the same entries.
 *
 *     floor <port of vLLM> <port of Redis>
 *
 * It is told on standard input which streams to open, as lines "<first> <count>", and ends with it. It looks for the
 * text and the token ids in each line that begins with "data: ", parses nothing else, and writes the XADDs of all that
 * has come in one round of epoll at once. Nothing is checked, counted, leased or acknowledged.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define LINE 16384

struct stream {
  int fd, held, key_size;
  unsigned long next;
  char key[96], tail[LINE];
};

static int poller, redis;
static char *out;
static size_t out_size, out_room;

static void die(const char *what) {
  perror(what);
  exit(1);
}

static int dial(int port) {
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
  if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) < 0) die("connect");
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return fd;
}

static void watch(int fd, void *what) {
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = what};
  if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
}

static void send_all(int fd, const char *data, size_t size) {
  while (size) {
    ssize_t sent = write(fd, data, size);
    if (sent < 0) die("write");
    data += sent;
    size -= sent;
  }
}

static void open_stream(int port, int number) {
  struct stream *stream = calloc(1, sizeof *stream);
  char key[64], body[256], request[512];
  int size = snprintf(key, sizeof key, "chat:tokens:{r%d}", number);
  stream->key_size = snprintf(stream->key, sizeof stream->key, "$%d\r\n%s\r\n", size, key);
  size = snprintf(body, sizeof body,
                  "{\"model\":\"bench\",\"messages\":[{\"role\":\"user\",\"content\":\"stream %d\"}],"
                  "\"stream\":true,\"return_token_ids\":true}", number);
  size = snprintf(request, sizeof request,
                  "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
                  "content-length: %d\r\n\r\n%s", size, body);
  stream->fd = dial(port);
  send_all(stream->fd, request, size);
  watch(stream->fd, stream);
}

static void put(const char *data, size_t size) {
  if (out_size + size > out_room && !(out = realloc(out, out_room = 2 * out_room + size))) die("realloc");
  memcpy(out + out_size, data, size);
  out_size += size;
}

static void put_text(const char *data, size_t size) {
  char head[24];
  put(head, snprintf(head, sizeof head, "$%zu\r\n", size));
  put(data, size);
  put("\r\n", 2);
}

static void take(struct stream *stream, const char *line, const char *end) {
  static const char text_mark[] = "\"content\":\"", ids_mark[] = "\"token_ids\":[";
  const char *text = memmem(line, end - line, text_mark, sizeof text_mark - 1);
  if (!text || *(text += sizeof text_mark - 1) == '"') return;
  const char *text_end = memchr(text, '"', end - text);
  const char *ids = memmem(text_end, end - text_end, ids_mark, sizeof ids_mark - 1);
  if (!ids) return;
  ids += sizeof ids_mark - 2;
  const char *ids_end = (const char *)memchr(ids, ']', end - ids) + 1;
  char id[24];
  put("*9\r\n$4\r\nXADD\r\n", 14);
  put(stream->key, stream->key_size);
  put_text(id, snprintf(id, sizeof id, "1-%lu", ++stream->next));
  put("$4\r\ntype\r\n$5\r\ndelta\r\n$7\r\ncontent\r\n", 34);
  put_text(text, text_end - text);
  put("$9\r\ntoken_ids\r\n", 15);
  put_text(ids, ids_end - ids);
}

static int receive(struct stream *stream) {
  static char buffer[65536 + LINE];
  memcpy(buffer, stream->tail, stream->held);
  ssize_t size = read(stream->fd, buffer + stream->held, 65536);
  if (size <= 0) return 0;
  char *line = buffer, *end = buffer + stream->held + size, *stop;
  while ((stop = memchr(line, '\n', end - line))) {
    if (stop - line > 6 && !memcmp(line, "data: ", 6)) take(stream, line, stop);
    line = stop + 1;
  }
  if ((stream->held = end - line) > LINE) die("line");
  memcpy(stream->tail, line, stream->held);
  return 1;
}

static int told(int port) {
  static char text[4096];
  int first, count, used;
  ssize_t size = read(0, text, sizeof text - 1);
  if (size <= 0) return 0;
  text[size] = 0;
  for (char *at = text; sscanf(at, "%d %d\n%n", &first, &count, &used) == 2; at += used)
    for (int number = first; number < first + count; number++) open_stream(port, number);
  return 1;
}

int main(int count, char **words) {
  static char replies[1 << 20];
  static int told_by, answered_by;
  if (count != 3) return 2;
  int port = atoi(words[1]);
  poller = epoll_create1(0);
  redis = dial(atoi(words[2]));
  fcntl(0, F_SETFL, O_NONBLOCK);
  watch(0, &told_by);
  watch(redis, &answered_by);
  for (;;) {
    struct epoll_event events[512];
    int ready = epoll_wait(poller, events, 512, -1);
    for (int place = 0; place < ready; place++) {
      void *what = events[place].data.ptr;
      if (what == &told_by) {
        if (!told(port)) return 0;
      } else if (what == &answered_by) {
        if (read(redis, replies, sizeof replies) <= 0) die("Redis");
      } else if (!receive(what)) {
        close(((struct stream *)what)->fd);
        free(what);
      }
    }
    if (out_size) send_all(redis, out, out_size);
    out_size = 0;
  }
}
