/* How this program comes to serve a virtual machine.
 *
 * Either it is the first process, from an initial RAM disk that holds nothing but this program and modules of the
 * kernel, and makes the root of a box of its disks, which say what they are by their serial numbers: layer0 is the
 * top layer of the image, scratch is what the box writes. (Firecracker's say something else: there they come in that
 * order.) Or the machine has a system of its own, in which this program is a service. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

#include "guest.h"

#define LAYERS 64
#define PLAIN (MS_NOSUID | MS_NOEXEC | MS_NODEV)
#define DEVICES_WAIT_MS 10000
#define GROUPS "/sys/fs/cgroup"

/* The console, or the journal of the system, is where one looks when a machine does not answer. */
static _Noreturn void stop(const char *what)
{
    fprintf(stderr, "hadal: cannot serve: %s: %s\n", what, strerror(errno));
    if (getpid() == 1) {
        sync();
        reboot(getenv("hadal_vsock") ? RB_AUTOBOOT : RB_POWER_OFF); /* Firecracker has nothing that powers off */
    }
    _exit(74);
}

static void mount_or_stop(const char *source, const char *target, const char *type, unsigned long flags,
                          const char *options)
{
    if (mkdir(target, 0755) && errno != EEXIST)
        stop(target);
    if (mount(source, target, type, flags, options))
        stop(target);
}

static void mount_kernel(void)
{
    mount_or_stop("devtmpfs", "/dev", "devtmpfs", 0, "mode=0755");
    int console = open("/dev/console", O_RDWR | O_NOCTTY);
    for (int i = 0; console >= 0 && i < 3; i++)
        dup2(console, i);
    mount_or_stop("proc", "/proc", "proc", PLAIN, NULL);
    mount_or_stop("sysfs", "/sys", "sysfs", PLAIN, NULL);
}

/* In the order in which they need one another; one that this machine has no device for does no harm. */
static void load_modules(void)
{
    FILE *order = fopen("/modules/order", "r");
    char name[128], path[160];
    while (order && fscanf(order, "%127s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST && errno != ENODEV))
            stop(path);
        close(fd);
    }
    if (order)
        fclose(order);
}

/* The device in a class whose file says so; waits for it. */
static void find_device(const char *class, const char *file, const char *wanted, char *device, size_t size)
{
    char path[512], line[128];
    for (int waited = 0; waited < DEVICES_WAIT_MS; waited++) {
        DIR *all = opendir(class);
        for (struct dirent *entry; all && (entry = readdir(all));) {
            snprintf(path, sizeof path, "%s/%s/%s", class, entry->d_name, file);
            if (!read_line(path, line, sizeof line) || strcmp(line, wanted))
                continue;
            snprintf(device, size, "/dev/%s", entry->d_name);
            closedir(all);
            return;
        }
        if (all)
            closedir(all);
        usleep(1000);
    }
    errno = ENODEV;
    stop(wanted);
}

static int open_port(void)
{
    char device[280];
    find_device("/sys/class/virtio-ports", "name", "hadal", device, sizeof device);
    int port = open(device, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (port < 0)
        stop(device);
    return port;
}

/* What the node connects to, where a machine has no such port. */
static int listen_to_host(const char *port)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = (unsigned)strtoul(port, NULL, 10)};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 16))
        stop("vsock");
    return fd;
}

/* The disk that the kernel found as the nth, from 0; waits for it. */
static void find_nth_disk(int n, char *device, size_t size)
{
    char name[4] = {0}, path[64];
    size_t length = 0;
    if (n >= 26)
        name[length++] = (char)('a' + n / 26 - 1);
    name[length] = (char)('a' + n % 26);
    snprintf(device, size, "/dev/vd%s", name);
    snprintf(path, sizeof path, "/sys/block/vd%s", name);
    for (int waited = 0; access(path, F_OK); waited++) {
        if (waited == DEVICES_WAIT_MS)
            stop(device);
        usleep(1000);
    }
}

static void mount_disk(int n, const char *serial, const char *target, const char *type, unsigned long flags)
{
    char device[280];
    if (getenv("hadal_ordered"))
        find_nth_disk(n, device, sizeof device);
    else
        find_device("/sys/block", "serial", serial, device, sizeof device);
    mount_or_stop(device, target, type, flags, type[1] == 'x' ? "discard" : NULL);
}

static void mount_root(void)
{
    const char *count = getenv("hadal_layers");
    int layers = count ? atoi(count) : 0;
    struct bytes options = {0};
    if (layers < 1 || layers > LAYERS) {
        errno = EINVAL;
        stop("number of layers");
    }
    bytes_add(&options, "lowerdir=", 9);
    for (int i = 0; i < layers; i++) {
        char serial[16], target[16];
        snprintf(serial, sizeof serial, "layer%d", i);
        snprintf(target, sizeof target, "/l%d", i);
        mount_disk(i, serial, target, "erofs", MS_RDONLY | MS_NODEV | MS_NOATIME);
        bytes_add(&options, i ? ":" : "", i > 0);
        bytes_add(&options, target, strlen(target));
    }
    mount_disk(layers, "scratch", "/rw", "ext4", MS_NODEV | MS_NOATIME);
    if ((mkdir("/rw/upper", 0755) && errno != EEXIST) || (mkdir("/rw/work", 0700) && errno != EEXIST))
        stop("/rw/upper");
    static const char rest[] = ",upperdir=/rw/upper,workdir=/rw/work,xino=on,index=off,metacopy=off,redirect_dir=off";
    bytes_add(&options, rest, sizeof rest);
    mount_or_stop("overlay", "/root", "overlay", MS_NODEV, (char *)options.data);
    bytes_free(&options);
    guest.kept[0] = open("/rw/upper", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    guest.kept[1] = -1;
    if (guest.kept[0] < 0)
        stop("/rw/upper");
}

static void fill_root(void)
{
    char shared[64];
    const char *shm = getenv("hadal_shm_mb");
    snprintf(shared, sizeof shared, "size=%sm,mode=1777", shm ? shm : "64");
    if (chdir("/root"))
        stop("/root");
    static const char *const moved[] = {"dev", "proc", "sys"};
    for (size_t i = 0; i < sizeof moved / sizeof *moved; i++) {
        char from[16];
        snprintf(from, sizeof from, "/%s", moved[i]);
        mount_or_stop(from, moved[i], NULL, MS_MOVE, NULL);
    }
    mount_or_stop("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5");
    mount_or_stop("tmpfs", "dev/shm", "tmpfs", PLAIN, shared);
    mount_or_stop("mqueue", "dev/mqueue", "mqueue", PLAIN, NULL);
    static const char *const links[][2] = {
        {"/proc/self/fd", "dev/fd"}, {"/proc/self/fd/0", "dev/stdin"}, {"/proc/self/fd/1", "dev/stdout"},
        {"/proc/self/fd/2", "dev/stderr"}, {"pts/ptmx", "dev/ptmx"},
    };
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        unlink(links[i][1]);
        if (symlink(links[i][0], links[i][1]))
            stop(links[i][1]);
    }
    if (mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
        stop("enter the root");
}

static bool write_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool written = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0)
        close(fd);
    return written;
}

/* Commands have a group of their own, whose processes are counted; this one is not in it. */
static void make_group(const char *above, const char *most)
{
    char path[320];
    snprintf(path, sizeof path, "%s/cgroup.subtree_control", above);
    bool counts = write_text(path, "+pids");
    snprintf(guest.group, sizeof guest.group, "%s/box", above);
    bool made = mkdir(guest.group, 0755) == 0 || errno == EEXIST;
    snprintf(path, sizeof path, "%s/pids.max", guest.group);
    if (!counts || !made || (most && !write_text(path, most)))
        stop("group of commands");
    struct { int *fd; const char *name; int flags; } files[] = {
        {&guest.commands_group, "procs", O_WRONLY}, {&guest.freezer, "freeze", O_WRONLY}, {&guest.events, "events", O_RDONLY}};
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/cgroup.%s", guest.group, files[i].name);
        *files[i].fd = open(path, files[i].flags | O_CLOEXEC);
        if (*files[i].fd < 0)
            stop(path);
    }
}

/* A copy of a machine has not booted when it did: what the kernel says is covered by a file of ours. */
static int make_boot_id(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0444);
    if (fd < 0)
        stop(path);
    return fd;
}

static void show_boot_id(int fd)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (mount(path, "/proc/sys/kernel/random/boot_id", NULL, MS_BIND, NULL) ||
        mount(NULL, "/proc/sys/kernel/random/boot_id", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
        stop("boot_id");
}

static void loopback_up(void)
{
    struct ifreq request = {.ifr_name = "lo"};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &request))
        stop("lo");
    request.ifr_flags |= IFF_UP;
    if (ioctl(fd, SIOCSIFFLAGS, &request))
        stop("lo");
    close(fd);
}

static void set_network_options(void)
{
    char path[80], name[IFNAMSIZ];
    write_text("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"); /* no IPv6 but on loopback */
    if (find_link(name)) {
        snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/disable_ipv6", name);
        write_text(path, "1");
    }
    write_text("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    write_text("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
}

static _Noreturn void serve_machine(int line, bool listens, uint64_t lease_s)
{
    clearenv();
    guest.machine = true;
    setpriority(PRIO_PROCESS, 0, -20);
    int oom_score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (listens) {
        guest.listening = (struct source){.kind = S_LISTEN, .fd = line};
        guest.connection.source = (struct source){.kind = S_CONNECTION, .fd = -1};
        serve(oom_score, 0, lease_s * 1000000000u);
    }
    serve_port(line, oom_score, lease_s * 1000000000u);
}

void boot_machine(void)
{
    mount_kernel();
    load_modules();
    const char *socket = getenv("hadal_vsock");
    int line = socket ? listen_to_host(socket) : open_port();
    guest.boot_id_file = make_boot_id("/boot_id");
    mount_root();
    fill_root();
    show_boot_id(guest.boot_id_file);
    /* Without the option a process that joins a group waits for all processors to pass a quiet point: 15 ms. */
    if (mount("cgroup2", GROUPS, "cgroup2", PLAIN, "favordynmods"))
        mount_or_stop("cgroup2", GROUPS, "cgroup2", PLAIN, NULL); /* before Linux 6.0 */
    make_group(GROUPS, getenv("hadal_pids"));
    loopback_up();
    set_network_options();
    struct rlimit core = {1, 1}, files = {1024, 1 << 20};
    setrlimit(RLIMIT_CORE, &core);
    setrlimit(RLIMIT_NOFILE, &files);
    umask(022);
    const char *lease = getenv("hadal_lease_s");
    serve_machine(line, socket, lease ? strtoull(lease, NULL, 10) : 0);
}

/* A service has a group that it may divide (systemd's Delegate=): itself in one part, commands in the other. */
static void divide_own_group(void)
{
    char line[256], above[300], path[320];
    if (!read_line("/proc/self/cgroup", line, sizeof line) || strncmp(line, "0::/", 4)) {
        errno = ENOTSUP;
        stop("groups of version 2");
    }
    char *end = strstr(line, "/guest"); /* it has been started again */
    if (end && !end[6])
        *end = 0;
    snprintf(above, sizeof above, GROUPS "%s", line + 3);
    snprintf(path, sizeof path, "%s/guest", above);
    if (mkdir(path, 0755) && errno != EEXIST)
        stop(path);
    snprintf(path, sizeof path, "%s/guest/cgroup.procs", above);
    if (!write_text(path, "0"))
        stop(path);
    make_group(above, NULL);
}

void join_machine(void)
{
    guest.kept[0] = guest.kept[1] = -1; /* what has changed of its disk nobody knows */
    int port = open_port();
    if (mkdir("/run/hadal", 0755) && errno != EEXIST)
        stop("/run/hadal");
    guest.boot_id_file = make_boot_id("/run/hadal/boot_id");
    show_boot_id(guest.boot_id_file);
    divide_own_group();
    set_network_options();
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    umask(022);
    serve_machine(port, false, 0);
}
