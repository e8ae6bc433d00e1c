/* Preloaded by bench/avx2.py: libraries whose cpuid instructions became ud2 are told of a CPU without AVX512 and AMX.
 * ud2 raises SIGILL; the handler asks the real cpuid, clears bits, and goes on behind the instruction. AVX-VNNI stays
 * unless HIDE_VNNI is set. Needs no CPUID faulting, which virtual machines and older AMD processors lack. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <ucontext.h>

#define BIT(n) (1u << (n))

static int keep_vnni;

static void hide(uint32_t leaf, uint32_t subleaf, uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d) {
  if (leaf == 7 && subleaf == 0) {
    /* F, DQ, IFMA, PF, ER, CD, BW, VL */
    *b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
    /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
    *c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));
    /* 4VNNIW, 4FMAPS, VP2INTERSECT; AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8 */
    *d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
  } else if (leaf == 7 && subleaf == 1) {
    *a &= ~(BIT(5) | BIT(21) | BIT(23) | (keep_vnni ? 0 : BIT(4))); /* AVX512-BF16, AMX-FP16, AVX-IFMA, AVX-VNNI */
    *d = 0;                                                         /* AVX-VNNI-INT8 and later, AVX10, APX */
  } else if (leaf == 0xd && subleaf == 0) {
    *a &= ~(BIT(5) | BIT(6) | BIT(7) | BIT(17) | BIT(18)); /* what XSAVE keeps of AVX512 and AMX */
  } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
    *a = *b = *c = *d = 0; /* AMX tiles, AVX10 */
  }
}

static void on_sigill(int signal_number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *at = (const uint8_t *)registers[REG_RIP];
  uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX], a, b, c, d;
  (void)info;
  if (at[0] != 0x0f || at[1] != 0x0b) { /* not ours: die of it */
    signal(signal_number, SIG_DFL);
    return;
  }
  __cpuid_count(leaf, subleaf, a, b, c, d);
  hide(leaf, subleaf, &a, &b, &c, &d);
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action = {.sa_sigaction = on_sigill, .sa_flags = SA_SIGINFO | SA_NODEFER};
  keep_vnni = getenv("HIDE_VNNI") == NULL;
  sigaction(SIGILL, &action, NULL);
}
