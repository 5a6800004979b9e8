/* The first process of a virtual machine: from an initial RAM disk that holds nothing but this program and
 * modules of the kernel, to the root of a box. The disks say what they are by their serial numbers:
 * layer0 is the top layer of the image, scratch is what the box writes. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define LAYERS 64
#define PLAIN (MS_NOSUID | MS_NOEXEC | MS_NODEV)
#define DEVICES_WAIT_MS 10000
#define HELD_WAIT_MS 5000

/* The console is where the node daemon looks when a machine does not answer. */
static _Noreturn void stop(const char *what)
{
    fprintf(stderr, "hadal: cannot boot: %s: %s\n", what, strerror(errno));
    sync();
    reboot(RB_POWER_OFF);
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

/* The first line of a file of the kernel; false if there is none. */
static bool read_line(const char *path, char *line, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, line, size - 1);
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return false;
    line[n] = 0;
    line[strcspn(line, "\n")] = 0;
    return true;
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

static void mount_disk(const char *serial, const char *target, const char *type, unsigned long flags)
{
    char device[280];
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
        mount_disk(serial, target, "erofs", MS_RDONLY | MS_NODEV | MS_NOATIME);
        bytes_add(&options, i ? ":" : "", i > 0);
        bytes_add(&options, target, strlen(target));
    }
    mount_disk("scratch", "/rw", "ext4", MS_NODEV | MS_NOATIME);
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
static void make_group(void)
{
    const char *most = getenv("hadal_pids");
    /* Without the option a process that joins a group waits for all processors to pass a quiet point: 15 ms. */
    if (mount("cgroup2", "/sys/fs/cgroup", "cgroup2", PLAIN, "favordynmods"))
        mount_or_stop("cgroup2", "/sys/fs/cgroup", "cgroup2", PLAIN, NULL); /* before Linux 6.0 */
    if (!write_text("/sys/fs/cgroup/cgroup.subtree_control", "+pids") || mkdir("/sys/fs/cgroup/box", 0755) ||
        (most && !write_text("/sys/fs/cgroup/box/pids.max", most)))
        stop("group of commands");
    guest.commands_group = open("/sys/fs/cgroup/box/cgroup.procs", O_WRONLY | O_CLOEXEC);
    guest.freezer = open("/sys/fs/cgroup/box/cgroup.freeze", O_WRONLY | O_CLOEXEC);
    guest.events = open("/sys/fs/cgroup/box/cgroup.events", O_RDONLY | O_CLOEXEC);
    if (guest.commands_group < 0 || guest.freezer < 0 || guest.events < 0)
        stop("group of commands");
}

/* A copy of a machine has not booted when it did: what the kernel says is covered by a file of ours, on the
 * initial RAM disk, where no path leads. */
static int make_boot_id(void)
{
    int fd = open("/boot_id", O_RDWR | O_CREAT | O_CLOEXEC, 0444);
    if (fd < 0)
        stop("/boot_id");
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

void boot_machine(void)
{
    mount_kernel();
    load_modules();
    int port = open_port();
    guest.boot_id_file = make_boot_id();
    mount_root();
    fill_root();
    show_boot_id(guest.boot_id_file);
    make_group();
    loopback_up();
    write_text("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"); /* no IPv6 but on loopback */
    write_text("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1");
    write_text("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    write_text("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    struct rlimit core = {1, 1}, files = {1024, 1 << 20};
    setrlimit(RLIMIT_CORE, &core);
    setrlimit(RLIMIT_NOFILE, &files);
    umask(022);
    const char *lease = getenv("hadal_lease_s");
    clearenv();
    guest.machine = true;
    setpriority(PRIO_PROCESS, 0, -20);
    int oom_score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    serve_port(port, oom_score, (lease ? strtoull(lease, NULL, 10) : 0) * 1000000000u);
}

uint64_t count_oom_kills(void)
{
    char text[16384];
    int fd = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return 0;
    text[n] = 0;
    const char *at = strstr(text, "\noom_kill ");
    return at ? strtoull(at + 10, NULL, 10) : 0;
}

int show_usage(void)
{
    struct sysinfo memory;
    struct statvfs disk;
    char processes[32] = "0";
    struct bytes out = {0};
    if (sysinfo(&memory) || statvfs("/", &disk))
        return applet_failed("usage");
    read_line("/sys/fs/cgroup/box/pids.current", processes, sizeof processes);
    put_number(&out, T_SIZE, (uint64_t)(memory.totalram - memory.freeram) * memory.mem_unit);
    put_number(&out, T_PID, strtoull(processes, NULL, 10));
    put_number(&out, T_LENGTH, (uint64_t)(disk.f_blocks - disk.f_bfree) * disk.f_frsize);
    put_number(&out, T_OOM_KILLS, count_oom_kills());
    bool written = write(1, out.data, out.length) == (ssize_t)out.length;
    bytes_free(&out);
    return written ? 0 : applet_failed("usage");
}

static const char *write_file(const struct field *field)
{
    const char *name = (const char *)field->value, *end = name + field->length;
    const char *content = memchr(name, 0, field->length);
    char path[300];
    errno = EINVAL;
    if (!content || strchr(name, '/') || snprintf(path, sizeof path, "/etc/%s", name) >= (int)sizeof path)
        return "name of a file";
    content++;
    mkdir("/etc", 0755);
    unlink(path); /* it may be a link */
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    bool written = fd >= 0 && write(fd, content, (size_t)(end - content)) == end - content;
    if (fd >= 0)
        close(fd);
    return written ? NULL : "a file in /etc";
}

static const char *new_boot_id(void)
{
    uint8_t id[16];
    char text[40];
    if (getrandom(id, sizeof id, 0) != sizeof id)
        return "random numbers";
    id[6] = (uint8_t)((id[6] & 0x0f) | 0x40); /* RFC 9562, version 4 */
    id[8] = (uint8_t)((id[8] & 0x3f) | 0x80);
    char *at = text;
    for (int i = 0; i < 16; i++)
        at += sprintf(at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", id[i]);
    *at++ = '\n';
    return pwrite(guest.boot_id_file, text, (size_t)(at - text), 0) == at - text ? NULL : "id of the boot";
}

/* Two machines that were one have the same random numbers to come: not after this. */
static const char *take_seed(const struct field *field)
{
    struct { struct rand_pool_info info; uint8_t data[64]; } pool = {0};
    size_t length = field->length < sizeof pool.data ? field->length : sizeof pool.data;
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    pool.info.entropy_count = (int)(8 * length);
    pool.info.buf_size = (int)length;
    memcpy(pool.data, field->value, length);
    bool taken = fd >= 0 && ioctl(fd, RNDADDENTROPY, &pool) == 0 && ioctl(fd, RNDRESEEDCRNG) == 0;
    if (fd >= 0)
        close(fd);
    return taken ? new_boot_id() : "random numbers";
}

/* As ioctl(2) takes it: the name of a link, and an address. */
static struct ifreq link_request(const char *address)
{
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in *at = (struct sockaddr_in *)&request.ifr_addr;
    at->sin_family = AF_INET;
    if (address)
        inet_pton(AF_INET, address, &at->sin_addr);
    return request;
}

static bool read_hardware(const char *text, unsigned char *hardware)
{
    return sscanf(text, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &hardware[0], &hardware[1], &hardware[2],
                  &hardware[3], &hardware[4], &hardware[5]) == 6;
}

static bool add_route(int fd, const char *target, const char *mask, const char *gateway)
{
    struct rtentry route = {.rt_flags = RTF_UP | (gateway ? RTF_GATEWAY : RTF_HOST), .rt_dev = "eth0"};
    struct { struct sockaddr *at; const char *text; } parts[] = {
        {&route.rt_dst, target}, {&route.rt_genmask, mask}, {&route.rt_gateway, gateway}};
    for (int i = 0; i < 3; i++) {
        struct sockaddr_in address = {.sin_family = AF_INET};
        if (parts[i].text)
            inet_pton(AF_INET, parts[i].text, &address.sin_addr);
        memcpy(parts[i].at, &address, sizeof address);
    }
    return ioctl(fd, SIOCADDRT, &route) == 0;
}

/* One address, and one neighbour, by which all else goes; what was set before goes with the link. */
static const char *set_network(const char *text)
{
    char own[16], gateway[16], own_hardware[18], gateway_hardware[18];
    int mtu;
    struct ifreq link = link_request(NULL);
    struct arpreq neighbour = {.arp_flags = ATF_COM | ATF_PERM, .arp_dev = "eth0"};
    errno = EINVAL;
    if (sscanf(text, "%15s %15s %17s %17s %d", own, gateway, own_hardware, gateway_hardware, &mtu) != 5 ||
        !read_hardware(gateway_hardware, (unsigned char *)neighbour.arp_ha.sa_data))
        return "text of the network";
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    link.ifr_flags = 0;
    bool set = fd >= 0 && ioctl(fd, SIOCSIFFLAGS, &link) == 0;
    link = link_request(NULL);
    link.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    set = set && read_hardware(own_hardware, (unsigned char *)link.ifr_hwaddr.sa_data) &&
          ioctl(fd, SIOCSIFHWADDR, &link) == 0;
    link = link_request(NULL);
    link.ifr_mtu = mtu;
    set = set && ioctl(fd, SIOCSIFMTU, &link) == 0;
    link = link_request(own);
    set = set && ioctl(fd, SIOCSIFADDR, &link) == 0;
    link = link_request("255.255.255.255");
    set = set && ioctl(fd, SIOCSIFNETMASK, &link) == 0;
    link = link_request(NULL);
    link.ifr_flags = IFF_UP;
    set = set && ioctl(fd, SIOCSIFFLAGS, &link) == 0;
    set = set && (add_route(fd, gateway, "255.255.255.255", NULL) || errno == EEXIST);
    memcpy(&neighbour.arp_pa, &(struct sockaddr_in){.sin_family = AF_INET}, sizeof(struct sockaddr_in));
    inet_pton(AF_INET, gateway, &((struct sockaddr_in *)&neighbour.arp_pa)->sin_addr);
    neighbour.arp_ha.sa_family = ARPHRD_ETHER;
    set = set && ioctl(fd, SIOCSARP, &neighbour) == 0 && (add_route(fd, "0.0.0.0", "0.0.0.0", gateway) || errno == EEXIST);
    if (fd >= 0) {
        int error = errno;
        close(fd);
        errno = error;
    }
    return set ? NULL : "network";
}

static const char *set_time(uint64_t ns)
{
    struct timespec now = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    return clock_settime(CLOCK_REALTIME, &now) ? "clock" : NULL;
}

static bool are_held(void)
{
    char text[256];
    ssize_t n = pread(guest.events, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    return strstr(text, "frozen 1") != NULL;
}

/* Held, commands see nothing of what happens to the machine meanwhile: that it is copied, and becomes another. */
static const char *hold_commands(bool held)
{
    if (write(guest.freezer, held ? "1" : "0", 1) != 1)
        return "freezer of commands";
    for (int waited = 0; held && !are_held(); waited++) {
        if (waited == HELD_WAIT_MS) {
            (void)!write(guest.freezer, "0", 1);
            errno = ETIMEDOUT;
            return "commands that do not stand still";
        }
        usleep(1000);
    }
    return NULL;
}

const char *settle_machine(const uint8_t *payload, size_t length)
{
    const uint8_t *at = payload;
    const char *wrong = NULL;
    struct field field;
    bool broken = false;
    while (!wrong && next_field(&at, payload + length, &field, &broken)) {
        switch (field.tag) {
        case T_HOSTNAME:
            if (sethostname((const char *)field.value, field.length))
                wrong = "hostname";
            break;
        case T_FILE: wrong = write_file(&field); break;
        case T_ADJUST: wrong = set_time(clock_ns(CLOCK_REALTIME) + read_number(field.value, field.length)); break;
        case T_TIME: wrong = set_time(read_number(field.value, field.length)); break;
        case T_SEED: wrong = take_seed(&field); break;
        case T_NETWORK: {
            char *text = field_text(&field);
            wrong = text ? set_network(text) : "text of the network";
            free(text);
            break;
        }
        case T_HELD: wrong = hold_commands(read_number(field.value, field.length) != 0); break;
        default: errno = EINVAL; wrong = "a field that does not belong there";
        }
    }
    if (broken)
        errno = EINVAL;
    return broken ? "fields that go beyond the frame" : wrong;
}
