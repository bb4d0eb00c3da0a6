/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Does steps in configfs and device-mapper, and undoes them, with as little around them as possible: what it takes
 * is the kernel's own share of an export's start and stop.
 *
 *     replay < STEPS
 *
 * STEPS are fields that end with NUL: mkdir PATH, write PATH VALUE, symlink PATH TARGET, and
 * map NAME SECTORS KIND PARAMETERS. Undone are links first, one after the other, then all directories, those of
 * different disks in THREADS threads, as waiting for the kernel to let go of a namespace would else be all there is,
 * and in the same way all mappings. Prints the seconds that making and taking away took. An attribute that is not
 * there is no error.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define THREADS 16
#define MOST (1 << 17)

enum kind { MKDIR, WRITE, SYMLINK, MAP };

struct step {
    enum kind kind;
    char *fields[4];
    char node[32]; /* of a mapping, whose link in /dev/mapper udev makes later */
};

static const struct {
    const char *name;
    int fields;
} kinds[] = {{"mkdir", 1}, {"write", 2}, {"symlink", 2}, {"map", 4}};

static struct step steps[MOST];
static size_t count;
static int control = -1;
/* Where the steps of each disk begin; they end where the next one's begin. */
static size_t groups[MOST], group_count, next_group;
static enum kind undone; /* what is taken away now */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void fail(const struct step *step)
{
    fprintf(stderr, "replay: %s: %s\n", step->fields[0], strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int dm(unsigned long request, const char *name, struct step *table)
{
    union {
        struct dm_ioctl head;
        char room[1024];
    } call = {{.version = {4, 0, 0}, .data_size = sizeof call, .data_start = sizeof call.head}};
    struct dm_target_spec *spec = (void *)(call.room + sizeof call.head);

    snprintf(call.head.name, sizeof call.head.name, "%s", name);
    if (request == DM_DEV_CREATE)
        snprintf(call.head.uuid, sizeof call.head.uuid, "%s", name);
    if (table) {
        call.head.target_count = 1;
        spec->length = strtoull(table->fields[1], NULL, 10);
        snprintf(spec->target_type, sizeof spec->target_type, "%s", table->fields[2]);
        snprintf((char *)(spec + 1), 512, "%s", table->fields[3]);
    }
    if (ioctl(control, request, &call))
        return -1;
    if (table)
        snprintf(table->node, sizeof table->node, "/dev/dm-%u", minor(call.head.dev));
    return 0;
}

/* The node of the mapping that a path in /dev/mapper is for. They are asked for in the order in which they were made. */
static const char *node_of(const char *path)
{
    static size_t last;
    size_t i;

    for (i = 0; i < count; i++) {
        struct step *step = &steps[(last + i) % count];

        if (step->kind == MAP && !strcmp(step->fields[0], path + strlen("/dev/mapper/"))) {
            last += i;
            return step->node;
        }
    }
    return path;
}

static void make(struct step *step)
{
    const char *value = step->fields[1];
    int fd, failed = 0;

    switch (step->kind) {
    case MKDIR:
        failed = mkdir(step->fields[0], 0755);
        break;
    case SYMLINK:
        failed = symlink(step->fields[1], step->fields[0]);
        break;
    case WRITE:
        fd = open(step->fields[0], O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            failed = errno != ENOENT;
        else {
            if (!strncmp(value, "/dev/mapper/", 12))
                value = node_of(value);
            failed = write(fd, value, strlen(value)) < 0;
            close(fd);
        }
        break;
    case MAP:
        failed = dm(DM_DEV_CREATE, step->fields[0], NULL) || dm(DM_TABLE_LOAD, step->fields[0], step) ||
                 dm(DM_DEV_SUSPEND, step->fields[0], NULL);
        break;
    }
    if (failed)
        fail(step);
}

static void *unmake_groups(void *unused)
{
    for (;;) {
        size_t group, i;

        pthread_mutex_lock(&mutex);
        group = next_group++;
        pthread_mutex_unlock(&mutex);
        if (group >= group_count)
            return unused;
        for (i = groups[group + 1]; i-- > groups[group];)
            if (steps[i].kind == undone && (undone == MKDIR ? rmdir(steps[i].fields[0])
                                                            : dm(DM_DEV_REMOVE, steps[i].fields[0], NULL)))
                fail(&steps[i]);
    }
}

static void unmake(enum kind kind)
{
    pthread_t threads[THREADS];
    int i;

    undone = kind;
    next_group = 0;
    for (i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, unmake_groups, NULL);
    for (i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

int main(void)
{
    static char text[1 << 26];
    double begin, made;
    size_t i, length = fread(text, 1, sizeof text - 1, stdin);
    char *p = text;
    int f;

    while (p < text + length) {
        struct step *step = &steps[count++];

        while (strcmp(kinds[step->kind].name, p))
            step->kind++;
        p += strlen(p) + 1;
        for (f = 0; f < kinds[step->kind].fields; f++, p += strlen(p) + 1)
            step->fields[f] = p;
        /* A port, a subsystem or a mapping begins. */
        if (step->kind == MAP || (step->kind == MKDIR && !strstr(step->fields[0], "/namespaces/")))
            groups[group_count++] = count - 1;
    }
    groups[group_count] = count;
    control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);

    begin = now();
    for (i = 0; i < count; i++)
        make(&steps[i]);
    made = now() - begin;
    begin = now();
    for (i = count; i-- > 0;)
        if (steps[i].kind == SYMLINK && unlink(steps[i].fields[0]))
            fail(&steps[i]);
    unmake(MKDIR);
    unmake(MAP);
    printf("%.6f %.6f\n", made, now() - begin);
    return 0;
}
