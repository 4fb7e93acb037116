/* A library that leaves a mark when it is loaded, by a system call of its own: what an attacker drops. */
__attribute__((constructor)) static void loaded(void)
{
	long result = 2; /* open */

	/* O_CREAT | O_WRONLY */
	__asm__ volatile("syscall"
			 : "+a"(result)
			 : "D"("/tmp/loaded"), "S"(0x41), "d"(0644)
			 : "rcx", "r11", "memory");
}
