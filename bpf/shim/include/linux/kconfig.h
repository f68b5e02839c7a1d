/* bcc includes this before every program. */
#define CONFIG_BPF_SYSCALL 1
